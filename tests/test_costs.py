"""Costs of blocks against models that are cut and run whole, and what follows from them."""

import json
import math
import statistics

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import adapruner
from adapruner.base.errors import AdaPrunerError
from adapruner.budget.counts import Budget, ByCost, kept_counts
from adapruner.budget.plan import make_plan
from adapruner.measurement.moments import measure_moments, removal_errors
from adapruner.model.loading import load_model
from adapruner.model.places import find_model
from adapruner.options import OF_A_SEARCH
from adapruner.run import choice
from adapruner.run.prune import preview
from adapruner.search.judging import Cost, Costs, cuts_to_measure, measure_costs
from adapruner.structure.build import build_structure
from adapruner.surgery import prune_model
from adapruner.text.windows import load_texts_by_use
from run_helpers import RUN_OPTIONS, stages_done

LOUD = 2
CLOSED = {name: value for name, value in RUN_OPTIONS.items() if name not in OF_A_SEARCH} | {"trials": 0}


@pytest.fixture
def loud_model(make_model):
    """With 24 channels in each of 4 layers, one of which matters more than the others."""
    model = make_model()
    with torch.no_grad():
        for number, layer in enumerate(model.model.layers):
            layer.mlp.down_proj.weight *= 4.0 if number == LOUD else 0.1
    return model


@pytest.fixture
def measured(loud_model, windows):
    """The structure, the errors that rank, the moments, and the costs without protected layers."""
    structure = build_structure(loud_model)
    moments = dict(measure_moments(loud_model, structure, windows))
    errors = removal_errors(loud_model, structure, moments)["tempered_error"]
    cuts = cuts_to_measure(structure, ByCost())
    return structure, errors, moments, measure_costs(loud_model, structure, errors, moments, windows, cuts)


def test_costs_are_divergences_of_models_in_which_one_block_is_cut(measured, loud_model, windows):
    structure, errors, moments, costs = measured
    assert [*costs.by_block] == [*range(len(structure.blocks))]
    with torch.no_grad():
        wanted = loud_model(windows).logits.double().log_softmax(-1)
    for number, cost in costs.by_block.items():
        block, counts = structure.blocks[number], [each.groups for each in structure.blocks]
        assert cost.kept == (0 if block.kind == "heads" else block.groups // 2)
        counts[number] = cost.kept
        pruned = prune_model(loud_model, structure, make_plan(structure, errors, counts), moments)
        with torch.no_grad():
            given = pruned(windows).logits.double().log_softmax(-1)
        divergence = (wanted.exp() * (wanted - given)).sum(-1)[:, ::4].mean(1)
        assert cost.nats == pytest.approx(float(divergence.mean()), rel=1e-3, abs=1e-6)
        assert cost.standard_error == pytest.approx(float(divergence.std()) / len(windows) ** 0.5, rel=1e-2, abs=1e-6)
    channels = {structure.blocks[number].layer: cost.nats for number, cost in costs.by_block.items() if number % 2}
    assert max(channels, key=channels.__getitem__) == LOUD


def test_layers_that_are_streamed_cost_the_same(measured, loud_model, windows, tmp_path):
    structure, errors, moments, costs = measured
    loud_model.save_pretrained(tmp_path)
    streamed, seen = load_model(find_model(str(tmp_path)), layer_wise=True), list[int]()
    cuts = {number: cost.kept for number, cost in costs.by_block.items()}
    again = measure_costs(streamed, structure, errors, moments, windows, cuts, seen.append)
    assert seen == [1] * len(cuts)
    for number, cost in costs.by_block.items():
        assert again.by_block[number].nats == pytest.approx(cost.nats, rel=1e-3, abs=1e-7)


def test_the_cost_of_other_widths_follows_the_errors(measured):
    """And a cost counts half as far from the median as it is, in logarithms."""
    structure, errors, _, costs = measured
    of_groups = costs.of_groups(structure, errors)
    kinds = {number: block.kind for number, block in enumerate(structure.blocks)}
    for number, block in enumerate(structure.blocks):
        parts: list[Tensor] = [flat[structure.group_offsets[number] :][: block.groups] for flat in (of_groups, errors)]
        own, of_errors = (part.double().sort().values for part in parts)
        cost = costs.by_block[number]
        median = statistics.median(each.nats for other, each in costs.by_block.items() if kinds[other] == block.kind)
        assert float(own[: block.groups - cost.kept].sum()) == pytest.approx(math.sqrt(cost.nats * median), rel=1e-4)
        assert (own / own.sum()).tolist() == pytest.approx((of_errors / of_errors.sum()).tolist(), rel=1e-4)


def test_of_many_feed_forwards_every_second_is_measured(make_model):
    """Others cost what their neighbours do; of few, or of several sizes, each is measured."""
    structure = build_structure(make_model(num_hidden_layers=22))
    cuts = cuts_to_measure(structure, ByCost(1, 1, heads=False, whole_attention=False))
    assert [structure.blocks[number].layer for number in cuts] == [*range(1, 21, 2)]
    assert len(cuts_to_measure(structure, ByCost(2, 2, heads=False, whole_attention=False))) == 18
    assert [structure.blocks[number].kind for number in cuts_to_measure(structure, ByCost(1, 1))].count("heads") == 20
    costs = {
        number: Cost(kept=kept, nats=2.0 ** (n % 3 * n), standard_error=0.1)
        for n, (number, kept) in enumerate(cuts.items())
    }
    errors = torch.rand(structure.group_offsets[-1], generator=torch.Generator().manual_seed(0))
    of_groups = Costs(by_block=costs).of_groups(structure, errors)
    median = statistics.median(cost.nats for cost in costs.values())
    known = {structure.blocks[number].layer: cost.nats for number, cost in costs.items()}
    for number, block in enumerate(structure.blocks):
        if block.kind == "channels" and 1 <= block.layer <= 20:
            near = [known[layer] for layer in (block.layer, block.layer - 1, block.layer + 1) if layer in known]
            nats = near[0] if block.layer in known else math.sqrt(near[0] * near[-1])
            own = of_groups[structure.group_offsets[number] :][: block.groups].sort().values
            assert float(own[: block.groups // 2].sum()) == pytest.approx(math.sqrt(nats * median), rel=1e-4)


def test_what_costs_more_keeps_more(measured):
    structure, errors, _, costs = measured
    allocation = ByCost(heads=False)
    for ratio in 0.02, 0.05, 0.1, 0.15:
        counts = kept_counts(structure, Budget(ratio, allocation), costs.of_groups(structure, errors))
        assert abs(structure.removed_parameters(counts) / structure.total_parameters - ratio) <= 0.005
        widths = {b.layer: count for b, count in zip(structure.blocks, counts, strict=True) if b.kind == "channels"}
        assert widths[LOUD] == max(widths.values())


def test_protected_layers_and_what_may_not_go_are_not_measured(make_model):
    structure = build_structure(make_model())
    layers = [structure.blocks[number].layer for number in cuts_to_measure(structure, ByCost(1, 2))]
    assert set(layers) == {1}
    only_whole = cuts_to_measure(structure, ByCost(heads=False))
    assert {structure.blocks[number].kind for number in only_whole} == {"heads", "channels"}
    channels = cuts_to_measure(structure, ByCost(heads=False, whole_attention=False))
    assert {structure.blocks[number].kind for number in channels} == {"channels"}
    kept = cuts_to_measure(structure, ByCost(whole_attention=False))
    assert all(0 < count < structure.blocks[number].groups for number, count in kept.items())
    bloom = build_structure(make_model("bloom"))
    assert all(count > 0 for count in cuts_to_measure(bloom, ByCost()).values())


def test_a_cut_that_breaks_the_model_is_the_last(make_model, windows):
    model = make_model()
    structure = build_structure(model)
    errors, cuts = torch.ones(structure.group_offsets[-1]), cuts_to_measure(structure, ByCost())
    with torch.no_grad():
        model.model.layers[LOUD].mlp.down_proj.weight[0, :12] = torch.inf
        model.model.layers[LOUD].mlp.down_proj.weight[0, 12:] = -torch.inf
    costs = measure_costs(model, structure, errors, None, windows, cuts)
    assert all(cost.nats == 1e6 for cost in costs.by_block.values())
    assert Costs.model_validate_json(costs.model_dump_json()) == costs
    broken = costs.by_block | {1: Cost(kept=12, nats=1e-3, standard_error=None)}
    counts = kept_counts(structure, Budget(0.02, ByCost()), Costs(by_block=broken).of_groups(structure, errors))
    assert [number for number, block in enumerate(structure.blocks) if counts[number] < block.groups] == [1]


@pytest.fixture(scope="module")
def closed(tmp_path_factory, model_folder, text_file):
    """A run without a search."""
    output = tmp_path_factory.mktemp("closed") / "run"
    return adapruner.prune(str(model_folder), str(text_file), output=output, **CLOSED)


def test_without_a_search_nothing_is_made_for_one(closed):
    files = {path.name for path in closed.output.iterdir()}
    assert not files & {"statistics.safetensors", "study.jsonl", "search.json"}
    assert set(load_texts_by_use(closed.output / "windows.safetensors")) == {"compensation"}
    assert not {"measuring", "searching"} & {*stages_done(closed.output)}
    result = json.loads((closed.output / "result.json").read_text())
    assert result["search"] is None
    assert result["costs"] == json.loads((closed.output / "costs.json").read_text())
    assert [model.role for model in closed.result.models] == ["dense", "pruned"]
    page, card = ((closed.output / name).read_text() for name in ("report.html", "model/README.md"))
    assert "What a cut costs" in page
    assert "Chosen calibration samples" not in page
    assert "no search; what costs the least divergence is removed first" in card
    assert "tempered_elimination" in card


def test_without_a_search_the_tempered_errors_rank(closed, model_folder):
    model = load_model(find_model(str(model_folder)))
    structure = build_structure(model)
    scores = load_file(closed.output / "removals.safetensors")["tempered_error"]
    counts = [len(block.kept) for block in closed.plan.blocks]
    assert closed.plan == make_plan(structure, scores, counts)


def test_a_preview_counts_the_moments_that_are_kept(closed, model_folder, text_file, tmp_path):
    foreseen = preview(str(model_folder), output=tmp_path / "other", calibration=str(text_file), **CLOSED)
    kept = sum(file.stat().st_size for file in (closed.output / "moments").iterdir())
    assert foreseen.moments_bytes <= kept <= 1.2 * foreseen.moments_bytes + 2**12


def test_costs_serve_every_ratio(closed, tmp_path):
    other = adapruner.prune(from_=closed.output, output=tmp_path / "other", ratio=0.15)
    assert not {"measuring costs", "comparing removals"} & {*stages_done(tmp_path / "other")}
    assert abs(other.plan.ratio - 0.15) <= 0.005


def test_it_is_said_where_costs_do_not_decide(closed, tmp_path, capsys):
    """By cost, a layer keeps a fifth of its channels, which is too much here."""
    options = {"ratio": 0.12, "head_share": 0.0, "remove_attention": False}
    other = adapruner.prune(from_=closed.output, output=tmp_path / "other", **options)
    assert sorted(len(block.kept) for block in other.plan.blocks if block.kind == "channels") == [2, 3, 24, 24]
    assert "because costs do not meet the ratio: a ratio of 0.12 cannot be reached" in capsys.readouterr().err
    assert "measuring costs" in stages_done(tmp_path / "other")
    assert other.result.costs is None
    page, card = ((tmp_path / "other" / name).read_text() for name in ("report.html", "model/README.md"))
    assert "What a cut costs" not in page
    assert "- no search; importance" in card


def test_of_long_windows_the_beginnings_tell_the_costs(model_folder, text_file, tmp_path, monkeypatch):
    """As the estimate of memory says."""
    read = list[torch.Size]()

    def enough(model, structure, errors, moments, windows, *rest):
        read.append(windows.shape)
        raise AdaPrunerError("enough")

    monkeypatch.setattr(choice, "TOKENS_FOR_COSTS", 64)
    monkeypatch.setattr(choice, "measure_costs", enough)
    with pytest.raises(AdaPrunerError, match="enough"):
        adapruner.prune(str(model_folder), str(text_file), output=tmp_path / "run", **CLOSED)
    [(count, length)] = read
    assert (count <= 8, length) == (True, 8)


def test_a_ratio_at_which_heads_are_removed_reads_their_moments(model_folder, text_file, tmp_path):
    def run(ratio, **options):
        return adapruner.prune(output=tmp_path / str(len([*tmp_path.iterdir()])), ratio=ratio, **options)

    own = CLOSED | {"model": str(model_folder), "calibration": str(text_file)}
    del own["ratio"]
    low = run(0.05, **own)
    high, alone = run(0.27, from_=low.output), run(0.27, **own)
    assert any(len(block.kept) < block.groups for block in high.plan.blocks if block.kind == "heads")
    read = [{path.name for path in (one.output / "moments").iterdir()} for one in (low, high)]
    assert read[0] < read[1]
    assert high.plan == alone.plan
