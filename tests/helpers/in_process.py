"""PyTorch's logits and chat templates without child processes, whose imports take seconds;
PyTorch for the transformers of this process; and a stop that ends a command, not the process."""

import sys
import warnings

import numpy as np

from easyaira import torchless
from easyaira.data import rendering, template
from easyaira.distributed import signals
from easyaira.errors import one_line
from easyaira.export import torch_check, torch_logits

logits_in_child = torch_check.torch_logits


def logits(folder, prompts, base=None):
    with warnings.catch_warnings():
        for outdated in (DeprecationWarning, FutureWarning):  # raised by peft
            warnings.simplefilter("ignore", outdated)
        arrays = torch_logits.logits_of(str(folder), prompts, base and str(base))
    return [np.asarray(array) for array in arrays]


class Renderer:
    """In place of `rendering.Child`."""

    def __init__(self, template, tokens):
        self.arguments = template, dict(tokens)

    def render(self, messages, add_generation_prompt=False):
        return rendering.render(*self.arguments, messages, add_generation_prompt)


def stop(error):
    message, status = one_line(error)
    print(message, file=sys.stderr)
    sys.exit(status)


def use(setattr_of=setattr):
    """Replace the child processes by calls in this process, which needs PyTorch."""
    setattr_of(signals, "leave", stop)
    setattr_of(torch_check, "torch_logits", logits)
    setattr_of(template, "Child", Renderer)
    setattr_of(torchless, "hide_torch", lambda: None)
