"""The command line as one of several processes, each with a simulated GPU: `torchrun … rank.py prune …`."""

import os
import sys

os.environ["SIMULATED_CUDA_DEVICES"] = os.environ["LOCAL_WORLD_SIZE"]

import simulated_cuda

simulated_cuda.install()
simulated_cuda.native_bfloat16 = os.environ.get("SIMULATED_NATIVE_BFLOAT16", "1") == "1"
if os.environ.get("SIMULATED_POOR_RANK") == os.environ["RANK"]:
    simulated_cuda.limit_memory(int(os.environ["SIMULATED_POOR_BYTES"]))

import simulated_nccl  # noqa: E402

simulated_nccl.install()

from adapruner.cli import main  # noqa: E402

code: object = 0
try:
    main()
except SystemExit as error:
    code = error.code
finally:
    peak = simulated_cuda.native.peak(int(os.environ["LOCAL_RANK"]))
    print(f"rank {os.environ['RANK']} held {peak} bytes", file=sys.stderr)
sys.stdout.flush()
sys.stderr.flush()
# Without the end of the interpreter, at which the simulated device and gloo sometimes abort each other.
os._exit(code if isinstance(code, int) else int(code is not None))
