"""The hooks of this package, registered like all hooks and called before the hooks of plugins."""

from torchtitan_lite import registry
from torchtitan_lite.training.hooks.console import ConsoleConfig, WorkConfig
from torchtitan_lite.training.hooks.jsonl import JsonlConfig, SampleLogConfig
from torchtitan_lite.training.hooks.profiler import ProfilerConfig
from torchtitan_lite.training.hooks.tensorboard import TensorBoardConfig

OWN = (  # in the order of their calls
    ProfilerConfig,  # first, so that a trace ends with its step
    SampleLogConfig,
    WorkConfig,
    JsonlConfig,
    TensorBoardConfig,
    ConsoleConfig,  # last, so that the files have a report before the console shows it
)

for hook in OWN:
    registry.hooks.register(hook)
