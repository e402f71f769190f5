"""The charts. Text in them is escaped, because plotly reads tags; their ink follows the page (see report.css)."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from adapruner.evaluation import Perplexity
from adapruner.planning import PruningPlan
from adapruner.result import TITLES, ModelNumbers, plus_minus
from adapruner.search import History, TriedPoint

LOSS_NAMES = {"loss": "loss, nats per token", "kl": "divergence from the dense model, nats per token"}
_LONGEST_LABEL = 26
# Colours that can be read on white and on near black.
_COLOURS = {"dense": "#8b94a3", "best_fixed": "#c08a3e", "searched": "#3d7fd9", "recovered": "#17a08c"}
_ACCENT, _SECOND, _CHOSEN, _FAINT = _COLOURS["searched"], _COLOURS["best_fixed"], _COLOURS["recovered"], "#8b94a3"
_GRID = "rgba(128, 136, 150, 0.22)"
_LINE_HEIGHT = 30


def removed_by_layer(plan: PruningPlan) -> go.Figure:
    """The share of every layer's channels, experts and heads that was removed; of heads only where some were."""
    kinds = [
        kind
        for kind in reversed(plan.kinds)
        if kind != "heads"
        or any(len(block.kept) < block.groups for block in plan.blocks if block.kind == kind)
        or len(plan.kinds) == 1
    ]
    shown = {plan.name_of(kind): [block for block in plan.blocks if block.kind == kind] for kind in kinds}
    figure = make_subplots(rows=len(shown), shared_xaxes=True, vertical_spacing=0.12)
    for row, (name, own) in enumerate(shown.items(), start=1):
        figure.add_bar(
            x=[block.layer for block in own],
            y=[1 - len(block.kept) / block.groups for block in own],
            name=name,
            marker_color=_SECOND if name == plan.head_name else _ACCENT,
            customdata=[[block.groups - len(block.kept), block.groups] for block in own],
            hovertemplate=f"layer %{{x}}: %{{customdata[0]:,}} of %{{customdata[1]:,}} {name} removed, %{{y:.0%}}"
            "<extra></extra>",
            row=row,
            col=1,
        )
        figure.update_yaxes(title_text=f"{name}<br>removed", row=row, col=1)
    figure.update_yaxes(tickformat=".0%", rangemode="tozero")
    figure.update_xaxes(showgrid=False, zeroline=False)
    figure.update_xaxes(title_text="layer", row=len(shown), col=1)
    return styled(figure, 80 + 160 * len(shown), bargap=0.25, showlegend=False)


def trials(history: History, chosen: int | None, selection: str) -> go.Figure:
    """The loss of every trial in the order of their beginning, and the best so far."""
    known = [point for point in history.points if point.loss is not None]
    whole = [point for point in known if not point.stopped]
    figure = go.Figure()
    for name, colour, symbol, points in (
        ("stopped early", _FAINT, "circle-open", [point for point in known if point.stopped]),
        ("searched", _ACCENT, "circle", [point for point in whole if not point.fixed_metric]),
        ("LLM-Pruner's metrics", _SECOND, "diamond", [point for point in whole if point.fixed_metric]),
        ("chosen", _CHOSEN, "circle-open", [point for point in known if point.number == chosen]),
    ):
        if points:
            is_ring = name == "chosen"
            figure.add_scatter(
                x=[point.number for point in points],
                y=[point.loss for point in points],
                name=name,
                mode="markers",
                marker={
                    "color": colour,
                    "symbol": symbol,
                    "size": 17 if is_ring else 8,
                    "line": {"color": colour, "width": 2.5 if is_ring else 1.2},
                },
                text=[html.escape(point.fixed_metric or name, quote=False) for point in points],
                hovertemplate="trial %{x}, %{text}: %{y:.4f}<extra></extra>",
            )
    figure.add_scatter(
        x=[point.number for point in known],
        y=list(accumulate((math.inf if point.stopped else _loss(point) for point in known), min)),
        name="best so far",
        mode="lines",
        line={"color": _CHOSEN, "width": 2, "shape": "hv"},
        hoverinfo="skip",
    )
    figure.update_xaxes(title_text="trial", showgrid=False, zeroline=False)
    figure.update_yaxes(title_text=LOSS_NAMES[selection])
    return styled(figure, 380)


def importance(history: History) -> go.Figure:
    """The share of each parameter of the search space in what sets the best trials apart."""
    names = [name for name, share in history.importance.items() if share >= 0.005]
    shares = [history.importance[name] for name in names]
    figure = go.Figure(
        go.Bar(
            x=shares,
            y=[_parameter(name) for name in names],
            orientation="h",
            marker_color=_ACCENT,
            text=[f"{share:.0%}" for share in shares],
            textposition="outside",
            cliponaxis=False,
            hovertemplate="%{y}: %{x:.1%}<extra></extra>",
        )
    )
    figure.update_xaxes(visible=False, range=[0, max(shares) * 1.15])
    figure.update_yaxes(autorange="reversed", showgrid=False)
    return styled(figure, 30 + 25 * len(names), bargap=0.35, showlegend=False)


def parallel_coordinates(history: History, chosen: int | None) -> go.Figure:
    """A line for every searched point through its place in the range of every parameter, from top to bottom, so that
    names can be read on a phone."""
    names = [name for name in history.importance or history.ranges if name in history.ranges]
    searched = sorted((point for point in history.points if point.positions and point.loss is not None), key=_loss)
    quarter = math.ceil(len(searched) / 4)
    best = [point for point in searched if point.number == chosen]
    figure = go.Figure()
    for name, colour, opacity, width, points in (
        ("others", _FAINT, 0.35, 1, searched[quarter:]),
        ("best quarter", _ACCENT, 0.7, 1.3, searched[:quarter]),
        ("chosen", _CHOSEN, 1, 3, best),
    ):
        rows = [row for point in points for row in [*_crossings(point, names), (None, None, "")]]
        if not rows:
            continue
        figure.add_scatter(
            x=[position for position, _, _ in rows],
            y=[row for _, row, _ in rows],
            text=[text for _, _, text in rows],
            name=name,
            mode="lines+markers",
            opacity=opacity,
            line={"color": colour, "width": width},
            marker={"size": 4 + width},
            hovertemplate="%{text}<extra></extra>",
        )
    figure.update_xaxes(
        range=[-0.04, 1.04], tickvals=[0, 1], ticktext=["least", "most"], side="top", zeroline=False, showgrid=False
    )
    figure.update_yaxes(
        range=[len(names) - 0.6, -0.6],
        tickvals=list(range(len(names))),
        ticktext=[f"{_parameter(name)}<br>{_ends(history.ranges[name])}" for name in names],
        tickfont_size=11,
    )
    return styled(figure, 110 + 36 * len(names))


def perplexities(models: Sequence[ModelNumbers]) -> go.Figure:
    """Perplexity of every model, text by text, with the standard error of the mean loss where it is known."""
    texts = list(models[0].perplexity)
    figure = make_subplots(rows=len(texts), subplot_titles=list(map(_label, texts)), vertical_spacing=0.3 / len(texts))
    bars = 0
    for row, text in enumerate(texts, start=1):
        measured = [model for model in models if text in model.perplexity]
        numbers = [model.perplexity[text] for model in measured]
        errors = [perplexity_error(number) for number in numbers]
        bars += len(numbers)
        figure.add_bar(
            y=[TITLES[model.role] for model in measured],
            x=[number.perplexity for number in numbers],
            orientation="h",
            marker_color=[_COLOURS[model.role] for model in measured],
            error_x=_error_bars(errors),
            hovertemplate="%{y}: %{x:.2f}%{customdata}<extra></extra>",
            customdata=[plus_minus(error, 2) for error in errors],
            row=row,
            col=1,
        )
    figure.update_annotations(x=0, xanchor="left", font_size=13)
    figure.update_yaxes(autorange="reversed", showgrid=False)
    figure.update_xaxes(rangemode="tozero")
    return styled(figure, 60 * len(texts) + _LINE_HEIGHT * bars, bargap=0.3, showlegend=False, margin_t=34)


def accuracies(models: Sequence[ModelNumbers]) -> go.Figure | None:
    """Accuracy in every task that has one, with standard errors."""
    figure = go.Figure()
    ends: list[float] = []
    tasks: set[str] = set()
    for model in models:
        scores = {task: score for task, score in model.tasks.items() if "acc" in score.metrics}
        if not scores:
            continue
        tasks |= scores.keys()
        values = [score.metrics["acc"] for score in scores.values()]
        errors = [score.standard_errors.get("acc") for score in scores.values()]
        ends += [value + sign * (error or 0) for value, error in zip(values, errors, strict=True) for sign in (-1, 1)]
        title = TITLES[model.role]
        figure.add_scatter(
            y=[html.escape(task, quote=False) for task in scores],
            x=values,
            orientation="h",
            mode="markers",
            name=title,
            marker={"color": _COLOURS[model.role], "size": 10},
            offsetgroup=model.role,
            error_x=_error_bars(errors),
            hovertemplate=f"%{{y}}, {title}: %{{x:.4f}}%{{customdata}}<extra></extra>",
            customdata=[plus_minus(error, 4) for error in errors],
        )
    if not ends:
        return None
    figure.update_yaxes(autorange="reversed")
    room = 0.05 * (max(ends) - min(ends)) + 0.01
    figure.update_xaxes(title_text="acc, more is better", range=[min(ends) - room, max(ends) + room])
    return styled(figure, 110 + 58 * len(tasks), scattermode="group", scattergap=0.35)


def shortened(text: str) -> str:
    """The end of a text source whose name is too long for a chart."""
    return text if len(text) <= _LONGEST_LABEL else f"…{text[1 - _LONGEST_LABEL :]}"


def described(value: float | int | str | tuple[float | int, ...]) -> str:
    """A number or a name as it is shown, numbers to three digits."""
    if isinstance(value, str):
        return value
    if isinstance(value, tuple):
        return ", ".join(map(described, value))
    return f"{value:.3g}".replace("-", "−") if isinstance(value, float) else str(value).replace("-", "−")


def perplexity_error(number: Perplexity) -> float | None:
    """The standard error of a perplexity, to first order, from that of the mean loss; None where that is not known."""
    error = number.loss_standard_error
    return None if error is None else number.perplexity * error


def _error_bars(errors: Sequence[float | None]) -> dict[str, Any]:
    return {"array": [error or 0.0 for error in errors], "thickness": 1.4, "width": 4, "color": _FAINT}


def _crossings(point: TriedPoint, names: Iterable[str]) -> list[tuple[float | None, float | None, str]]:
    """Where the line of a point crosses the rows of the parameters that it has, and what is said there."""
    return [
        (
            point.positions[name],
            row,
            f"trial {point.number}, loss {point.loss:.4f}<br>{_parameter(name)}: {_value(point.parameters[name])}",
        )
        for row, name in enumerate(names)
        if name in point.positions
    ]


def _loss(point: TriedPoint) -> float:
    assert point.loss is not None
    return point.loss


def _parameter(name: str) -> str:
    return html.escape(name.replace("_", " "), quote=False)


def _ends(ends: tuple[float | int | str, ...]) -> str:
    return " … ".join(map(_value, ends))


def _value(value: float | int | str) -> str:
    return html.escape(described(value), quote=False)


def _label(text: str) -> str:
    return html.escape(shortened(text), quote=False)


def styled(figure: go.Figure, height: int, margin_t: int = 12, **layout: Any) -> go.Figure:
    """A figure in the style of the page, of a height in pixels."""
    clear = "rgba(0, 0, 0, 0)"
    figure.update_layout(
        template=go.layout.Template(),
        height=height,
        autosize=True,
        margin={"l": 8, "r": 12, "t": margin_t, "b": 8},
        paper_bgcolor=clear,
        plot_bgcolor=clear,
        font={"family": "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif", "size": 13},
        legend={"orientation": "h", "x": 0, "xanchor": "left", "y": 1.02, "yanchor": "bottom"},
        hoverlabel={"bgcolor": "#1d2530", "bordercolor": "#1d2530", "font": {"color": "#ffffff", "size": 13}},
        hovermode="closest",
        **layout,
    )
    figure.update_xaxes(automargin=True, gridcolor=_GRID, zerolinecolor=_GRID, linecolor=_GRID, title_font_size=12)
    figure.update_yaxes(
        automargin=True, gridcolor=_GRID, zerolinecolor=_GRID, linecolor=_GRID, title_font_size=12, title_standoff=10
    )
    return figure
