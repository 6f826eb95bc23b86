"""The checkpoints of a run. A resumed run continues as if it had never stopped.

steps: folders, published by a rename              save: Saver, which may write in the background
manifest: sizes and SHA-256                        restore: find a step, verify it, load it
tensors: safetensors with pieces of all ranks      weights: folders in Hugging Face's format
state: the step and the identity of a run

See docs/checkpoints.md.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from torchtitan_lite.config.load import Problem
from torchtitan_lite.config.problem import Remedy
from torchtitan_lite.launch.end import RunError


class SaveFailed(RunError):
    """An error: a step could not be saved. The steps before it are unchanged."""

    outcome = "not-saved"


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """The settings that decide when a run saves checkpoints, and which checkpoint it starts from."""

    enable: bool = False
    """Save checkpoints, and resume from the newest step in the run's folder."""
    folder: str = "checkpoint"
    """Folder for the steps, inside the run's folder."""
    interval: Annotated[int, Field(ge=1, examples=[500])] = 500
    """Steps between two saves. The last step is always saved."""
    keep_latest_k: Annotated[int, Field(ge=0), Remedy("use 0 for all")] = 10
    """Number of newest steps to keep. 0: all steps."""
    async_mode: Literal["disabled", "async", "async_with_pinned_mem"] = "disabled"
    """disabled: training waits until a step is written. async: training waits only for a copy in host memory.
    async_with_pinned_mem: the copy is in pinned memory, which is faster from a GPU and kept between saves."""
    on_failure: Literal["stop", "continue"] = "stop"
    """What the run does after a failed save. If the last step cannot be saved, the run ends with an error."""
    load_step: Annotated[int, Field(ge=-1), Remedy("use -1 for the newest step")] = -1
    """Step to resume from; later steps move to the folder "earlier". -1: the newest undamaged step."""
    initial_load_path: str = ""
    """Folder of a step, of steps or of a run. A new run starts with the weights of the newest step there."""
    initial_load_in_hf: bool = False
    """initial_load_path is a folder in Hugging Face's format: config.json and safetensors."""
    allow_changes: bool = False
    """Resume although the model, tokenizer, dataset, seed or batch differs from the saved run. If the order
    of the data changes, the data starts from its beginning."""
    last_save_model_only: bool = False
    """Save only the weights at the last step: other runs can load them, but no run can resume from them."""
    last_save_in_hf: bool = False
    """After the last step, also write the model to the folder hf, for transformers and other programs."""
    export_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of the weights in the folder hf, and in a last step with only the weights."""

    def problems(self, key: str) -> list[Problem]:
        """Return a problem for each option of a feature that is off, and if no run could resume later."""
        found: list[Problem] = []

        def add(name: str, rule: str, remedy: str, *reads: str) -> None:
            keys = tuple(f"{key}.{other}" for other in reads)
            found.append(Problem(f"{key}.{name}", getattr(self, name), rule, remedy, keys))

        if self.export_dtype != "float32" and not (self.last_save_model_only or self.last_save_in_hf):
            rule = "is for a last step that holds the model alone and for the folder hf, and both are off"
            # With only one step kept, the step must not hold the model alone.
            feature = "last_save_in_hf" if self.keep_latest_k == 1 else "last_save_model_only"
            settings = [f"{key}.{name} = true" for name in ["enable"] * (not self.enable) + [feature]]
            remedy = f"leave it out, or set {' and '.join(settings)}"
            add("export_dtype", rule, remedy, "enable", "last_save_model_only", "last_save_in_hf")
        if self.initial_load_in_hf and not self.initial_load_path:
            rule = "says what initial_load_path is, and that is empty"
            remedy = f"name the folder in {key}.initial_load_path, or leave it out"
            add("initial_load_in_hf", rule, remedy, "initial_load_path")
        if self.last_save_model_only and self.keep_latest_k == 1:
            rule = "would leave only a last step that holds the model alone, and none to go on from"
            add("keep_latest_k", rule, "use 2 or more, or 0 for all", "last_save_model_only")
        for name in ("load_step", "last_save_model_only", "last_save_in_hf"):
            default = type(self).__dataclass_fields__[name].default
            if not self.enable and getattr(self, name) != default:
                add(name, "needs checkpoints, which are off", f"set {key}.enable", "enable")
        return found
