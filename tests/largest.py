"""Whether something holds a matrix in memory that it should not."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation returns; subclasses without storage do not count."""

    elements = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        for x in result if isinstance(result, tuple | list) else (result,):
            if type(x) in (torch.Tensor, torch.nn.Parameter):
                self.elements = max(self.elements, x.numel())
        return result
