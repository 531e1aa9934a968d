"""The reversible tables between our parameters and the tensors of OpenAI's and Hugging Face's files. NumPy only.

A foreign tensor is one or more of our parameters, each with its dims in another order and some of them written as one
dim, joined along an axis. Both directions follow from those letters: 'D NH' is our [D, N, H] as a matrix [D, N*H].

L layers, D embed, N heads, H head dim, F mlp hidden, V palette, T tokens, K classes.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from igpt_jax.config import UserError

Sizes = Mapping[str, int]  # of the dims, by their letters


class Part(NamedTuple):
    """One of our parameters inside a foreign tensor."""
    ours: str  # its name; its last letters are its dims
    dims: str  # the same dims in the foreign order; those without a space between are one dim there

    @property
    def letters(self) -> str:
        return self.ours.rsplit("_", 1)[1]

    def shape(self, sizes: Sizes) -> tuple[int, ...]:
        """In the foreign tensor."""
        return tuple(int(np.prod([sizes[letter] for letter in group if letter != "1"])) for group in self.dims.split())

    def to_foreign(self, array: np.ndarray, sizes: Sizes) -> np.ndarray:
        order = [self.letters.index(letter) for letter in self.dims if letter in self.letters]
        return array.transpose(order).reshape(self.shape(sizes))

    def to_ours(self, array: np.ndarray, sizes: Sizes) -> np.ndarray:
        foreign = [letter for letter in self.dims if letter in self.letters]
        order = [foreign.index(letter) for letter in self.letters]
        return array.reshape([sizes[letter] for letter in foreign]).transpose(order)


class Tensor(NamedTuple):
    """One foreign tensor, or one per block where its name has {}."""
    name: str
    parts: tuple[Part, ...]
    axis: int = 0  # along which parts are joined
    bias: str = ""  # the name of its bias, which must be zero; as long as the tensor's last dim

    @property
    def stacked(self) -> bool:
        return "{}" in self.name

    def shape(self, sizes: Sizes) -> tuple[int, ...]:
        shape = list(self.parts[0].shape(sizes))
        shape[self.axis] = sum(part.shape(sizes)[self.axis] for part in self.parts)
        return tuple(shape)


def _one(name: str, ours: str, dims: str, bias: str = "") -> Tensor:
    return Tensor(name, (Part(ours, dims),), bias=bias)


# OpenAI's TF1 variables. Projections are (head, head dim, input), the last one (head, head dim, output).
OPENAI = (
    _one("model/wte", "token_embed_VD", "V D"),
    _one("model/sos", "start_D", "D"),
    _one("model/wpe", "position_embed_TD", "T D"),
    _one("model/h{}/ln_1/g", "attention_norm_D", "D"),
    _one("model/h{}/attn/q_proj", "query_DNH", "N H D"),
    _one("model/h{}/attn/k_proj", "key_DNH", "N H D"),
    _one("model/h{}/attn/v_proj", "value_DNH", "N H D"),
    _one("model/h{}/attn/c_proj", "out_NHD", "N H D"),
    _one("model/h{}/ln_2/g", "mlp_norm_D", "D"),
    _one("model/h{}/mlp/c_fc/w", "up_DF", "D F"),
    _one("model/h{}/mlp/c_proj/w", "down_FD", "F D"),
    _one("model/ln_f/g", "final_norm_D", "D"),
    _one("model/wtet", "head_VD", "V D"),
    _one("model/clf/wclf", "class_head_KD", "K D"),
)

# transformers' ImageGPT. Its projections (Conv1D) are [in, out] with biases, which this model does not have.
_HF_TRUNK = (
    Tensor("transformer.wte.weight", (Part("token_embed_VD", "V D"), Part("start_D", "1 D"))),
    _one("transformer.wpe.weight", "position_embed_TD", "T D"),
    _one("transformer.h.{}.ln_1.weight", "attention_norm_D", "D"),
    Tensor("transformer.h.{}.attn.c_attn.weight",
           (Part("query_DNH", "D NH"), Part("key_DNH", "D NH"), Part("value_DNH", "D NH")), axis=1,
           bias="transformer.h.{}.attn.c_attn.bias"),
    _one("transformer.h.{}.attn.c_proj.weight", "out_NHD", "NH D", bias="transformer.h.{}.attn.c_proj.bias"),
    _one("transformer.h.{}.ln_2.weight", "mlp_norm_D", "D"),
    _one("transformer.h.{}.mlp.c_fc.weight", "up_DF", "D F", bias="transformer.h.{}.mlp.c_fc.bias"),
    _one("transformer.h.{}.mlp.c_proj.weight", "down_FD", "F D", bias="transformer.h.{}.mlp.c_proj.bias"),
    _one("transformer.ln_f.weight", "final_norm_D", "D"),
)
HUGGING_FACE = {
    "ImageGPTForCausalImageModeling": (*_HF_TRUNK, _one("lm_head.weight", "head_VD", "V D")),
    "ImageGPTForImageClassification": (*_HF_TRUNK, _one("score.weight", "class_head_KD", "K D")),
}


class Layers(Sequence):
    """The layers of one parameter, each read when it is asked for; a parameter outside the blocks has one."""

    def __init__(self, count: int, read: Callable[[int], np.ndarray]):
        self._count, self._read = count, read

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, layer: int) -> np.ndarray:
        if not 0 <= layer < self._count:
            raise IndexError(layer)
        return self._read(layer)


class Weights(Protocol):
    """A model's weights in some kind of file, seen as our parameters.

    Attributes:
      sizes: of L, D, N, H, F, V and T, and K where there is a class head.
      palette_VC: float32 [V, 3]; None where the files have none.
      steps_done: of the training that made them; 0 where unknown.
      names: of the parameters that they hold.
      framework: what computes their logits.
    """
    framework: str
    sizes: Sizes
    palette_VC: np.ndarray | None
    steps_done: int
    names: tuple[str, ...]

    def layers(self, name: str) -> Sequence[np.ndarray]:
        """float32 arrays in our dims, one per layer; one alone for a parameter outside the blocks."""

    def tensor_names(self) -> list[str]:
        """Of the files' own tensors."""

    def tensor(self, name: str) -> np.ndarray:
        """One of the files' own tensors."""

    def outputs(self, tokens_BT: np.ndarray, hidden_BT: np.ndarray | None) -> dict[str, np.ndarray]:
        """float32 logits by the head that gives them: `pixels` [B, T, V], `classes` [B, K].

        Those of a head that is not there, or that nothing here can compute, are left out.

        Args:
          tokens_BT: palette indices.
          hidden_BT: the pixels that a masked model does not see; None for others.
        """


def finite(where: str, name: str, array: np.ndarray) -> np.ndarray:
    """The array. Raises UserError if it holds a NaN or an infinity. min and max need no copy of the array."""
    if array.size and not np.isfinite([array.min(), array.max()]).all():
        raise UserError(f"{where}: its weights are not finite (NaN or infinity in {name}). The training that saved "
                        "them diverged. Convert an earlier checkpoint of it.")
    return array


def masked(weights: Weights) -> bool:
    """Whether they are a BERT model's: hidden pixels from all others. It alone has no start vector."""
    return "start_D" not in weights.names


class ForeignWeights:
    """`Weights` in foreign files, by a table.

    Args:
      where: they are, for messages.
      table: of the tensors that the files hold.
      sizes: of the dims.
      read: (name, axis, start, stop) -> that slice of a foreign tensor.
    """

    palette_VC: np.ndarray | None = None

    def __init__(self, where: str, table: Sequence[Tensor], sizes: Sizes,
                 read: Callable[[str, int, int, int], np.ndarray], steps_done: int = 0):
        self.sizes, self.steps_done = sizes, steps_done
        self._where, self._table, self._read = where, table, read
        self.names = tuple(part.ours for tensor in table for part in tensor.parts)

    def layers(self, name: str) -> Sequence[np.ndarray]:
        tensor = next(tensor for tensor in self._table if any(part.ours == name for part in tensor.parts))
        start = 0
        for part in tensor.parts:
            stop = start + part.shape(self.sizes)[tensor.axis]
            if part.ours == name:
                break
            start = stop

        def read(layer: int) -> np.ndarray:
            name = tensor.name.format(layer)
            array = finite(self._where, name, self._read(name, tensor.axis, start, stop))
            return part.to_ours(array, self.sizes)

        return Layers(self.sizes["L"] if tensor.stacked else 1, read)

    def tensor_names(self) -> list[str]:
        return list(expected(self._table, self.sizes))

    def tensor(self, name: str) -> np.ndarray:
        return self._read(name, 0, 0, expected(self._table, self.sizes)[name][0])


def expected(table: Sequence[Tensor], sizes: Sizes) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the foreign tensors, in the order in which `foreign_tensors` makes them."""
    shapes = {}
    for tensor in table:
        for layer in range(sizes["L"] if tensor.stacked else 1):
            shapes[tensor.name.format(layer)] = tensor.shape(sizes)
            if tensor.bias:
                shapes[tensor.bias.format(layer)] = tensor.shape(sizes)[-1:]
    return shapes


def foreign_tensors(weights: Weights, table: Sequence[Tensor]) -> Iterator[tuple[str, np.ndarray]]:
    """The foreign tensors of `table` made from `weights`, one at a time: one kind after the other, layer by layer."""
    sizes = weights.sizes
    for tensor in table:
        parts = [(part, weights.layers(part.ours)) for part in tensor.parts]
        for layer in range(sizes["L"] if tensor.stacked else 1):
            arrays = [part.to_foreign(layers[layer], sizes) for part, layers in parts]
            yield tensor.name.format(layer), np.ascontiguousarray(np.concatenate(arrays, tensor.axis), np.float32)
            if tensor.bias:
                yield tensor.bias.format(layer), np.zeros(tensor.shape(sizes)[-1:], np.float32)
        del parts, arrays  # before the next kind is read: ours are whole stacks of layers


def check(where: str, found: Mapping[str, tuple[int, ...]], table: Sequence[Tensor], sizes: Sizes) -> None:
    """Raises UserError, naming them, where tensors are missing, unknown or of another shape than the table says."""
    wanted = expected(table, sizes)
    faults = [f"{name} is missing" for name in wanted if name not in found]
    faults += [f"{name} is unknown" for name in found if name not in wanted]
    faults += [f"{name} is {list(found[name])}, not {list(shape)}" for name, shape in wanted.items()
               if name in found and tuple(found[name]) != shape]
    if faults:
        more = f", and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise UserError(f"{where}: {'; '.join(faults[:3])}{more}. These are not the weights of an ImageGPT of "
                        f"{sizes['L']} layers, width {sizes['D']} and {sizes['N']} heads.")
