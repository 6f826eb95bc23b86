"""The state of a run on disk, with which the run goes on as if nothing had happened; see docs/checkpoints.md.

steps: folders, published by a rename      save: Saver, in the background if configured
manifest: sizes and SHA-256                restore: find a step, verify it, load it
tensors: pieces of many ranks, an index    tensor_file: one safetensors file
state: the step and the identity of a run  weights: Hugging Face's folders
"""

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from torchtitan_lite.config.load import Problem
from torchtitan_lite.launch.end import RunError


class SaveFailed(RunError):
    """A step could not be saved; the ones before it are as they were."""

    outcome = "not-saved"


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Whether and how often the state of the run is saved, and what it goes on from."""

    enable: bool = False
    """Save the state of the run, and go on from the newest step in its folder."""
    folder: str = "checkpoint"
    """Folder for the steps, inside the run's folder."""
    interval: Annotated[int, Field(ge=1, examples=[500])] = 500
    """Steps between two saves; the last step is always saved."""
    keep_latest_k: Annotated[int, Field(ge=0)] = 10
    """How many steps are kept, the newest; 0: all."""
    async_mode: Literal["disabled", "async", "async_with_pinned_mem"] = "disabled"
    """disabled: training waits until a step is written. async: it waits for a copy in host memory.
    async_with_pinned_mem: that memory is pinned, which is faster from a GPU, and kept between saves."""
    on_failure: Literal["stop", "continue"] = "stop"
    """What a save that fails makes of the run; the last step's always ends it with an error."""
    load_step: Annotated[int, Field(ge=-1)] = -1
    """Step to go on from; later ones move to the folder "earlier". -1: the newest that is not damaged."""
    initial_load_path: str = ""
    """Folder of a step, of steps or of a run: a new run starts with its weights, and nothing else of it."""
    initial_load_in_hf: bool = False
    """initial_load_path is a folder with config.json and safetensors, as on the Hugging Face Hub."""
    allow_changes: bool = False
    """Go on although the model's settings, tokenizer, dataset, seed or batch are not those of the step; where
    the data's order is another one, it is begun anew."""
    last_save_model_only: bool = False
    """The last step holds the model alone: to load, but not to go on from."""
    last_save_in_hf: bool = False
    """After the last step, write the model to the folder hf as well, for transformers and others."""
    export_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of a last step that holds the model alone, and of the folder hf."""

    def problems(self, key: str) -> list[Problem]:
        """Options of a feature that is off, and a last step that nothing could go on from."""
        found = []
        if self.export_dtype != "float32" and not (self.last_save_model_only or self.last_save_in_hf):
            rule = "is for a last step that holds the model alone and for the folder hf, and both are off"
            remedy = f"set {key}.last_save_model_only or {key}.last_save_in_hf, or leave it out"
            reads = (f"{key}.last_save_model_only", f"{key}.last_save_in_hf")
            found.append(Problem(f"{key}.export_dtype", self.export_dtype, rule, remedy, reads))
        if self.initial_load_in_hf and not self.initial_load_path:
            rule, remedy = "says what initial_load_path is, and that is empty", f"set {key}.initial_load_path"
            reads = (f"{key}.initial_load_path",)
            found.append(Problem(f"{key}.initial_load_in_hf", True, rule, remedy, reads))
        if self.last_save_model_only and self.keep_latest_k == 1:
            rule = "would leave only a last step that holds the model alone, and none to go on from"
            remedy, reads = "use 2 or more, or 0 for all", (f"{key}.last_save_model_only",)
            found.append(Problem(f"{key}.keep_latest_k", self.keep_latest_k, rule, remedy, reads))
        for name in ("load_step", "last_save_model_only", "last_save_in_hf"):
            default = type(self).__dataclass_fields__[name].default
            if not self.enable and getattr(self, name) != default:
                rule, remedy = "needs checkpoints, which are off", f"set {key}.enable"
                found.append(Problem(f"{key}.{name}", getattr(self, name), rule, remedy, (f"{key}.enable",)))
        return found
