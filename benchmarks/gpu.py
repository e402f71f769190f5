"""The first run on a GPU: what fails there, how fast every step is, and its peak memory against the estimate.

    python benchmarks/gpu.py --output runs/gpu
    python benchmarks/gpu.py --output runs/gpu --model Qwen/Qwen3-4B
    python benchmarks/gpu.py --output runs/gpu --tiny --device cpu    # tries this file, in minutes on a CPU

`make gpu` does the same with the data that it has installed. Every stage is a process with a time limit: the device
tests of the suite, the plan of a tiny model on the CPU and on the device, `quick`, `standard` and healing of a given
model, and a random model in the shapes of Qwen3-8B, layer by layer, in memory and healed. A stage that fails leaves its
output, and the next one runs. Everything ends after ten minutes, or after `--minutes`. The random model needs 75 GB of
disk; with less free, it has fewer layers. The folder has `results.md`, `results.json` and the output of every stage.
Environment variables, user names and absolute paths of the user are not in them. Linux only.
"""

from __future__ import annotations

import contextlib
import getpass
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from cyclopts import run
from transformers import AutoConfig, AutoModelForCausalLM

import machine
from adapruner.base.errors import without_secrets
from seven_billion import write_tokenizer

ROOT, GIB, MIB = Path(__file__).resolve().parents[1], 2**30, 2**20
QWEN3_8B: dict[str, Any] = {
    **{"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "vocab_size": 151936},
    **{"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": False},
}
TINY: dict[str, Any] = {
    **{"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 6, "vocab_size": 4096},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "tie_word_embeddings": False},
}
# Each of 36 layers on disk: the original, the second moments, and the pruned model before and after healing.
DISK_OF_LAYER = 2 * 10**9
# A known text at hand. Written text would say nothing, as random weights write it.
TEXT = ("--calibration", "boolq-passages")
REPORTED = ("--evaluate", "boolq-passages", "--limit", "8")
FEW_WINDOWS = ("--ratio", "0.1", *TEXT, "--seq-len", "64", "--compensation-windows", "64")
TAIL = 30


@dataclass
class Bench:
    """Runs stages one after the other, and writes what came of them.

    Args:
        output: folder of the results.
        model: Hub id or folder of the model of `quick` and `standard`.
        minutes: after which no stage runs any more.
    """

    output: Path
    device: str
    model: str
    tiny: bool
    minutes: float
    machine: dict[str, Any] = field(default_factory=dict)
    stages: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.ends = time.monotonic() + 60 * self.minutes
        self.scratch, self.temporary = self.output / "scratch", tempfile.mkdtemp()
        shutil.rmtree(self.scratch, ignore_errors=True)
        self.scratch.mkdir(parents=True)
        for log in self.output.glob("*.log"):
            log.unlink()

    def run(self, name: str, share: float, *arguments: object, note: str = "") -> dict[str, Any]:
        """Runs a command of this Python for at most this share of all minutes. Its output is in `NAME.log`."""
        command, log = [sys.executable, *map(str, arguments)], self.output / f"{name}.log"
        stage: dict[str, Any] = {"stage": name, "command": self.anonymous(shlex.join(["python", *command[1:]]))}
        stage |= {"outcome": "not run: no time was left", "seconds": 0.0, "note": note}
        self.stages.append(stage)
        limit, started = min(60 * share * self.minutes, self.ends - time.monotonic()), time.monotonic()
        if limit > 0:
            environment = os.environ | {"TMPDIR": self.temporary, "COLUMNS": "120"}
            # In a session of its own, so that whatever it starts ends with it.
            streams: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stderr": subprocess.STDOUT}
            with log.open("wb") as file:
                process = subprocess.Popen(
                    command, cwd=ROOT, stdout=file, env=environment, start_new_session=True, **streams
                )
                try:
                    stage["rc"] = process.wait(limit)
                    stage["outcome"] = "ok" if stage["rc"] == 0 else f"failed, exit code {stage['rc']}"
                except subprocess.TimeoutExpired:
                    stage["outcome"] = f"stopped after {limit:.0f} s"
                finally:
                    if process.poll() is None:
                        os.killpg(process.pid, signal.SIGKILL)
                        process.wait()
            text = log.read_text(encoding="utf-8", errors="replace")
            # The command line writes the traceback of an unexpected failure to a file.
            for traceback in Path(self.temporary).glob("adapruner-*.log"):
                text += f"\n{traceback.read_text(encoding='utf-8')}"
                traceback.unlink()
            log.write_text(self.anonymous(text), encoding="utf-8")
            stage["seconds"] = round(time.monotonic() - started, 1)
            if stage["outcome"] != "ok":
                stage["tail"] = self.anonymous(text).splitlines()[-TAIL:]
        print(f"{name}: {stage['outcome']}, {stage['seconds']:.0f} s", flush=True)
        self.save()
        return stage

    def prune(self, name: str, share: float, model: Path | str, *options: object, folder: str = "") -> dict[str, Any]:
        """A stage that prunes a model, with the costs of its steps and the estimate of its memory.

        Args:
            folder: of an earlier stage, whose measurements are used; the new results replace its own.
        """
        run_folder = self.scratch / (folder or name)
        options = ("--device", self.device, *options) if "--device" not in options else options
        estimate = self.estimate(model, options)
        started = time.time()
        arguments = (model, *options, "-o", run_folder, "--verbose", *["--overwrite"] * bool(folder))
        stage = self.run(name, share, "-m", "adapruner", "prune", *arguments)
        stage |= {"estimate": estimate} | steps_of(run_folder / "log.jsonl", started)
        if stage["outcome"] == "ok":
            result = json.loads((run_folder / "result.json").read_text(encoding="utf-8"))
            stage["parameters"] = {of["role"]: of["parameters"] for of in result["models"]}
            stage["perplexity"] = {
                of["role"]: {text: reported["perplexity"] for text, reported in of["perplexity"].items()}
                for of in result["models"]
            }
            add_rates(stage, result)
        self.save()
        return stage

    def estimate(self, model: Path | str, options: tuple[object, ...]) -> dict[str, Any]:
        """The memory that `inspect --cost` states for a run with these options, in bytes."""
        command = [sys.executable, "-m", "adapruner", "inspect", model, "--cost", "--json", *options]
        try:
            done = subprocess.run(
                [*map(str, command)], cwd=ROOT, capture_output=True, text=True, check=True, timeout=120
            )
            stated = json.loads(done.stdout)
            return {name: stated[name] for name in ("device_bytes", "host_bytes", "largest", "layer_wise", "fits")}
        except subprocess.CalledProcessError as error:
            return {"failed": self.anonymous(error.stderr).splitlines()[-TAIL:]}
        except (subprocess.TimeoutExpired, ValueError) as error:
            return {"failed": [self.anonymous(str(error))]}

    def random_model(self, name: str, dtype: str, sizes: dict[str, Any]) -> Path:
        """Writes a random model in a stage of its own."""
        folder = self.scratch / name
        call = json.dumps({"folder": str(folder), "device": self.device, "dtype": dtype, "sizes": sizes})
        self.run(f"{name}-write", 0.15, __file__, "--write", call, note=f"{sizes['num_hidden_layers']} layers")
        return folder

    def anonymous(self, text: str) -> str:
        """A text without secrets, absolute paths of the user and the user's name."""
        text = without_secrets(text)
        for path, shown in ((self.temporary, "TMP"), (str(ROOT), "."), (str(Path.home()), "~")):
            text = text.replace(path, shown) if len(path) > 1 else text
        if (given := Path(self.model)).exists():
            text = text.replace(str(given.resolve()), given.name).replace(str(given), given.name)
        text = re.sub(r"/(?:home|Users)/[^/\s'\"]+", "~", text)
        return re.sub(rf"(?<=[/-]){re.escape(getpass.getuser())}(?=/)", "USER", text)

    def save(self) -> None:
        """Writes `results.json` and `results.md` with the stages so far."""
        results = {"machine": self.machine, "minutes": self.minutes, "tiny": self.tiny, "stages": self.stages}
        (self.output / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        (self.output / "results.md").write_text("\n".join(page(self.machine, self.stages)) + "\n", encoding="utf-8")


def main(
    *,
    output: Path = Path("runs/gpu"),
    device: str = "cuda",
    model: str = "smollm2",
    tiny: bool = False,
    minutes: float | None = None,
    write: str | None = None,
) -> None:
    """Runs all stages; `write` is for the process that this one starts.

    Args:
        output: Folder of the results.
        device: cuda, cuda:1, …, or cpu.
        model: Of quick and standard: Hub id or model folder, the largest that you have.
        tiny: A tiny random model in place of all others, to try this file.
        minutes: For all stages; by default 10, and 40 with --tiny.
    """
    if write is not None:
        write_model(**json.loads(write))
        return
    if not is_available(device):
        sys.exit(f"PyTorch {torch.__version__} finds no device {device} here; --tiny --device cpu tries this command")
    model = str(Path(model).resolve()) if Path(model).exists() else model
    bench = Bench(output.resolve(), device, model, tiny, minutes or (40 if tiny else 10))
    try:
        bench.machine = describe_machine(device)
        device_tests(bench)
        plans(bench)
        given_model(bench)
        shapes(bench)
    finally:
        bench.save()
        shutil.rmtree(bench.scratch, ignore_errors=True)
        shutil.rmtree(bench.temporary, ignore_errors=True)
    print(f"\n{(bench.output / 'results.md').read_text(encoding='utf-8')}\nall of it: {output}")
    sys.exit(any(stage["outcome"] != "ok" for stage in bench.stages))


def device_tests(bench: Bench) -> None:
    """The suite's tests of devices. Those of the simulated device are skipped where PyTorch is built for a real one."""
    marks = () if bench.tiny else ("-m", "")
    options = ("-p", "no:cacheprovider", "--color", "no")
    stage = bench.run("tests", 0.15, "-m", "pytest", "tests/device", "tests/test_device.py", *marks, *options)
    with contextlib.suppress(OSError, IndexError):
        stage["note"] = (bench.output / "tests.log").read_text(encoding="utf-8").splitlines()[-1].strip("= ")


def plans(bench: Bench) -> None:
    """The plan of a tiny model in float32 on the CPU, and on the device in memory and layer by layer."""
    model = bench.random_model("plan", "float32", TINY)
    first: set[tuple[int, str, int]] = set()
    for name, device, way in (
        ("plan-on-cpu", "cpu", "--no-layer-wise"),
        ("plan-on-device", bench.device, "--no-layer-wise"),
        ("plan-layer-by-layer", bench.device, "--layer-wise"),
    ):
        options = ("--effort", "quick", *FEW_WINDOWS, *REPORTED, "--device", device, way)
        stage = bench.prune(name, 0.08, model, *options)
        if stage["outcome"] == "ok":
            plan = json.loads((bench.scratch / name / "plan.json").read_text(encoding="utf-8"))
            groups = {(block["layer"], block["kind"], group) for block in plan["blocks"] for group in block["kept"]}
            if first:
                stage["note"] = f"keeps {len(first & groups) / len(first):.2%} of the groups of the first plan"
            first = first or groups


def given_model(bench: Bench) -> None:
    """`quick`, `standard`, healing of 200,000 tokens, and the speed of the pruned model against the original."""
    model: Path | str = bench.random_model("tiny", "bfloat16", TINY) if bench.tiny else bench.model
    few = FEW_WINDOWS if bench.tiny else ()
    short = ("--heal", "2k") if bench.tiny else ()
    bench.prune("quick", 0.15, model, "--effort", "quick", *few, *REPORTED)
    bench.prune("standard", 0.2, model, "--effort", "standard", *few, *REPORTED, *short)
    options = ("--effort", "standard", *few, *REPORTED, "--heal", "4k" if bench.tiny else "200k")
    bench.prune("healing", 0.15, model, *options, folder="standard")
    speed = bench.scratch / "speed.json"
    arguments = ("benchmark", bench.scratch / "standard" / "model", "--against", model, "--device", bench.device)
    stage = bench.run("speed", 0.1, "-m", "adapruner", *arguments, "-o", speed)
    if stage["outcome"] == "ok":
        stage["speed"] = json.loads(bench.anonymous(speed.read_text(encoding="utf-8")))
    for folder in ("quick", "standard"):
        shutil.rmtree(bench.scratch / folder, ignore_errors=True)


def shapes(bench: Bench) -> None:
    """Random weights in the shapes of Qwen3-8B: layer by layer, in memory, and healed on 200,000 tokens."""
    layers = min(QWEN3_8B["num_hidden_layers"], 1 + shutil.disk_usage(bench.scratch).free // DISK_OF_LAYER)
    model = bench.random_model("8b", "bfloat16", TINY if bench.tiny else QWEN3_8B | {"num_hidden_layers": layers})
    few = FEW_WINDOWS if bench.tiny else ("--ratio", "0.1", *TEXT, "--compensation-windows", "128")
    options = ("--effort", "quick", *few, *REPORTED)
    bench.prune("8b-layer-by-layer", 0.25, model, *options, "--layer-wise")
    shutil.rmtree(bench.scratch / "8b-layer-by-layer", ignore_errors=True)
    bench.prune("8b-in-memory", 0.25, model, *options, "--no-layer-wise")
    heal = ("--heal", "4k" if bench.tiny else "200k")
    bench.prune("8b-healing", 0.3, model, *options, "--no-layer-wise", *heal, folder="8b-in-memory")


def write_model(folder: str, device: str, dtype: str, sizes: dict[str, Any]) -> None:
    """A random Qwen 3, and a tokenizer of the words of a text. Weights are drawn wide enough that the layers matter
    as much at every hidden size."""
    special = {"bos_token_id": 1, "eos_token_id": 2, "initializer_range": 1.28 / math.sqrt(sizes["hidden_size"])}
    config = AutoConfig.for_model("qwen3", **sizes, **special)
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    print(f"{model.num_parameters():,} parameters")
    model.save_pretrained(folder, max_shard_size="2GB" if sizes["hidden_size"] > TINY["hidden_size"] else "1MB")
    write_tokenizer(Path(folder), TEXT[1], sizes["vocab_size"])


def steps_of(log: Path, since: float) -> dict[str, Any]:
    """Seconds and peak memory of the steps of a run, from its log: those that ended after a time. Memory of the process
    is given beyond what it held at first, which is the program itself."""
    steps: dict[str, dict[str, Any]] = {}
    held, running = 0, ""
    for line in log.read_text(encoding="utf-8").splitlines() if log.is_file() else ():
        try:
            entry = json.loads(line)
        except ValueError:  # a kill cut it off
            continue
        if entry["time"] < since:
            continue
        if entry["event"] == "started":
            held, running = held or entry["memory_mib"], entry["stage"]
            continue
        running = ""
        step = steps.setdefault(entry["stage"], {"times": 0, "seconds": 0.0, "process_mib": 0, "device_mib": 0})
        step["times"] += 1
        step["seconds"] = round(step["seconds"] + entry["seconds"], 2)
        step["process_mib"] = max(step["process_mib"], entry["peak_memory_mib"] - held)
        step["device_mib"] = max(step["device_mib"], entry["peak_on_accelerator_mib"])
    peaks = {name: max((step[name] for step in steps.values()), default=0) for name in ("process_mib", "device_mib")}
    return {"steps": steps, "peak": peaks} | ({"unfinished_step": running} if running else {})


def add_rates(stage: dict[str, Any], result: dict[str, Any]) -> None:
    """Tokens per second of the steps whose tokens the run records; healing without the choice of its learning rate."""
    steps, config = stage["steps"], result["config"]
    read = config["seq_len"] * sum(result["windows"].get("compensation", {}).values())
    tokens = {"reading activations": read} | ({"writing text": read} if config["calibration"] == "mix" else {})
    if evaluated := steps.get("evaluating"):
        texts = [text for of in result["models"][-evaluated["times"] :] for text in of["perplexity"].values()]
        tokens["evaluating"] = sum(text["predicted_tokens"] for text in texts)
    for name in tokens.keys() & steps.keys():
        if steps[name]["seconds"]:
            steps[name]["tokens_per_second"] = round(tokens[name] / steps[name]["seconds"], 1)
    if "healing" in steps and (record := (result["healing"] or {}).get("record")):
        steps["healing"]["tokens_per_second"] = round(record["tokens"] / record["seconds"], 1)


def page(described: dict[str, Any], stages: list[dict[str, Any]]) -> list[str]:
    """The results as Markdown."""
    lines = ["# AdaPruner on an accelerator", "", *(f"- {name}: {value}" for name, value in described.items()), ""]
    lines += [
        "GiB are peaks on the device, for a CPU of the process beyond the program; the estimate is for the same.",
        "",
    ]
    lines += ["| stage | outcome | seconds | GiB | estimated GiB | |", "|---|---|---|---|---|---|"]
    for stage in stages:
        peak, estimate = stage.get("peak", {}), stage.get("estimate", {}).get("device_bytes")
        peaks = peak.get("device_mib") or peak.get("process_mib")
        sizes = [f"{peaks * MIB / GIB:.2f}" if peaks else "", f"{estimate / GIB:.2f}" if estimate else ""]
        cells = [stage["stage"], stage["outcome"], f"{stage['seconds']:.0f}", *sizes, stage["note"]]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "| stage | step | seconds | tokens per second | GiB |", "|---|---|---|---|---|"]
    for stage in stages:
        for name, step in stage.get("steps", {}).items():
            gib = f"{(step['device_mib'] or step['process_mib']) * MIB / GIB:.2f}"
            rate = f"{step['tokens_per_second']:,.0f}" if "tokens_per_second" in step else ""
            lines.append(f"| {stage['stage']} | {name} | {step['seconds']:.1f} | {rate} | {gib} |")
    for stage in stages:
        for title, tail in (("", stage.get("tail")), (": estimate", stage.get("estimate", {}).get("failed"))):
            if tail:
                lines += ["", f"## {stage['stage']}{title}", "", f"`{stage['command']}`", "", "```text", *tail, "```"]
    return lines


def is_available(device: str) -> bool:
    """PyTorch can compute on this device."""
    try:
        return device == "cpu" or bool(torch.get_device_module(device).is_available())
    except RuntimeError:
        return False


def describe_machine(device: str) -> dict[str, Any]:
    """Device, driver, processor and versions."""
    described: dict[str, Any] = {"device": device}
    if device != "cpu":
        module = torch.get_device_module(device)
        described["device"] = f"{device}, {module.get_device_name(torch.device(device))}"
        if device.startswith("cuda"):
            described["memory"] = f"{torch.cuda.get_device_properties(device).total_memory / GIB:.1f} GiB"
        described["devices"] = module.device_count()
    for name, command in {
        "driver": ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
        "commit": ["git", "rev-parse", "--short", "HEAD"],
    }.items():
        with contextlib.suppress(OSError, subprocess.CalledProcessError, IndexError):
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
            described[name] = done.stdout.splitlines()[0]
    described |= {"CUDA": torch.version.cuda, "processor": machine.describe()}
    described["versions"] = ", ".join(f"{name} {version(name)}" for name in ("adapruner", "torch", "transformers"))
    return described


if __name__ == "__main__":
    run(main)
