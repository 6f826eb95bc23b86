"""Our own hooks, registered as those of plugins are, and called in this order before them."""

from torchtitan_lite import registry
from torchtitan_lite.training.hooks.console import ConsoleConfig
from torchtitan_lite.training.hooks.jsonl import JsonlConfig
from torchtitan_lite.training.hooks.profiler import ProfilerConfig
from torchtitan_lite.training.hooks.samples import SampleLogConfig
from torchtitan_lite.training.hooks.tensorboard import TensorBoardConfig
from torchtitan_lite.training.hooks.work import WorkConfig

OWN = (
    ProfilerConfig,  # first, so that a trace ends with its step
    SampleLogConfig,
    WorkConfig,
    JsonlConfig,
    TensorBoardConfig,
    ConsoleConfig,  # last: what a line says is in the files by then
)

for hook in OWN:
    registry.hooks.register(hook)
