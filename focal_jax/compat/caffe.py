"""The FocalLoss layer of Caffe, with its prototxt."""

import difflib
import math
import numbers
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format
from jax import Array, lax
from jax.typing import ArrayLike

from focal_jax import _checks
from focal_jax._modules import loss_weight, static_options
from focal_jax._reduction import reduce_loss
from focal_jax._softmax_integer import softmax_focal_loss_with_integer_labels
from focal_jax.compat._labels import class_indices

__all__ = ["FocalLossLayer"]

_MODES = ("FULL", "VALID", "BATCH_SIZE", "NONE")  # in the order of Caffe's numbers
_NORMALIZATIONS = tuple(mode.lower() for mode in _MODES)
_ENUMS = {"NormalizationMode": _MODES, "FocalLossType": ("ORIGIN", "LINEAR")}

# What matters here of Caffe's schema. A net is read as a layer that holds layers: a net and
# a layer share no field but the name, and so the text may be either.
_SCHEMA = {
    "FocalLossParameter": (
        "optional FocalLossType type",
        "optional double alpha",
        "optional double gamma",
    ),
    "SoftmaxParameter": ("optional int32 axis",),
    "LossParameter": (
        "optional int32 ignore_label",
        "optional NormalizationMode normalization",
        "optional bool normalize",
    ),
    "Layer": (
        "optional string name",
        "optional string type",
        "repeated string bottom",
        "repeated string top",
        "repeated double loss_weight",
        "repeated bool propagate_down",
        "optional FocalLossParameter focal_loss_param",
        "optional SoftmaxParameter softmax_param",
        "optional LossParameter loss_param",
        "repeated Layer layer",
    ),
}


def _layer_class() -> Any:
    """Return the message class `Layer` of the schema, in a pool of its own."""
    file = descriptor_pb2.FileDescriptorProto(name="layer.proto", package="focal_jax")
    for enum_name, values in _ENUMS.items():
        enum = file.enum_type.add(name=enum_name)
        for number, value in enumerate(values):
            enum.value.add(name=value, number=number)
    for message_name, fields in _SCHEMA.items():
        message = file.message_type.add(name=message_name)
        for number, field in enumerate(fields, 1):
            label, kind, name = field.split()
            kind = {"type": f"TYPE_{kind.upper()}"} if kind.islower() else {"type_name": kind}
            message.field.add(name=name, number=number, label=f"LABEL_{label.upper()}", **kind)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("focal_jax.Layer"))


_Layer = _layer_class()

# Fields that Caffe knows in this layer, or in its messages, and that change nothing here.
_WITHOUT_EFFECT = {
    "": {"phase", "param", "blobs", "include", "exclude", "transform_param"},
    "focal_loss_param": {"beta"},  # of the type LINEAR
    "softmax_param": {"engine"},
    "loss_param": set(),
}


def _known_fields() -> dict[str, set[str]]:
    """Return the fields that a layer of this type, and each of its messages, may have."""
    known = {}
    for part, others in _WITHOUT_EFFECT.items():
        message = _Layer.DESCRIPTOR
        message = message.fields_by_name[part].message_type if part else message
        known[part] = others | {field.name for field in message.fields}
    return known


_KNOWN = _known_fields()


def _fields(text: str) -> Iterator[tuple[int, str, str, str]]:
    """Yield of each field in a text that is well formed: layer, message, name and place.

    Layers are numbered from 1 as they come, and 0 is what stands outside of them. The parser
    itself does not tell which unknown fields it has passed over.
    """
    tokens: Any = text_format.Tokenizer(text.splitlines())
    path, last, layer = [], "", 0
    while not tokens.AtEnd():
        token, at = tokens.token, tokens.ParseError("")
        tokens.NextToken()
        if token in ("{", "<"):
            layer += not path and last == "layer"
            path.append(last)
        elif token in ("}", ">"):
            last = path.pop()
        elif token not in ("[", ",", ":") and tokens.token in (":", "{", "<", "["):
            last, inside = token, path[:1] == ["layer"]
            yield layer * inside, ".".join(path[inside:]), token, f"{at.GetLine()}:{at.GetColumn()}"


def _refuse_unknown_fields(text: str, layer: int) -> None:
    """Refuse fields that Caffe does not know in this layer: a typo would be a default."""
    for number, message, name, place in _fields(text):
        if number != layer or message not in _KNOWN or name in _KNOWN[message]:
            continue
        known = sorted(_KNOWN[message])
        close = difflib.get_close_matches(name, known, 1)
        raise _checks.InputError(
            f"text: at line:column {place} got an unknown field {name!r} in "
            f"{message or 'the FocalLoss layer'}, wanted {close[0] if close else f'one of {known}'}"
        )


def _find(text: str, name: str | None) -> Any:
    """Return the one FocalLoss layer in the text that has this name, if one is given."""
    try:
        net = text_format.Parse(text, _Layer(), allow_unknown_field=True)
    except text_format.ParseError as error:
        raise _checks.InputError(
            f"text: at line:column {error} Wanted a layer or a net in protobuf's text format, "
            f"with a normalization of {', '.join(_MODES)}"
        ) from error
    layers = [(i, x) for i, x in enumerate((net, *net.layer)) if x.type == "FocalLoss"]
    if not layers:
        raise _checks.InputError("text: got no FocalLoss layer, wanted one")
    chosen = [(i, layer) for i, layer in layers if name in (None, layer.name)]
    if len(chosen) != 1:
        raise _checks.InputError(
            f"name: got {name!r}, wanted the name of one of the FocalLoss layers, "
            f"{[layer.name for _, layer in layers]}"
        )
    index, layer = chosen[0]
    _refuse_unknown_fields(text, index)
    return layer


@dataclass(frozen=True)
class FocalLossLayer:
    r"""Compute what Caffe's FocalLoss layer does: a softmax, the focal loss, one number.

        loss = loss_weight * sum of -alpha (1 - p_t)**gamma log p_t / max(1, normalizer)

    Attributes:
      alpha: weight of every class.
      gamma: focusing exponent, 0 or more.
      axis: the class axis.
      ignore_label: positions with this label have loss 0 and gradient 0.
      normalization: the normalizer: `"full"` every position, `"valid"` those that are not
        ignored, `"batch_size"` the product of the axes before the class axis (not, as for
        `focal_jax.reduce_loss`, the first axis alone), `"none"` 1.
      loss_weight: a factor on the loss.
      return_prob: return the softmax too, the layer's second top; without a gradient.

    Raises:
      ValueError: for an unknown normalization, a negative gamma, and options that are no
        numbers.

    Differentiation: that of `focal_jax.softmax_focal_loss_with_integer_labels`, in the
      logits. Where the original divides by `1 - p` or takes the logarithm of a probability
      that underflowed, this is exact.

    Example:
      >>> import jax.numpy as jnp
      >>> from focal_jax.compat.caffe import FocalLossLayer
      >>> layer = FocalLossLayer.from_prototxt('''
      ...     layer {
      ...       name: "loss" type: "FocalLoss" bottom: "score" bottom: "label" top: "loss"
      ...       loss_param { ignore_label: 255 }
      ...       focal_loss_param { alpha: 1 gamma: 2 }
      ...     }''')
      >>> layer.ignore_label, layer.normalization
      (255, 'valid')
      >>> logits = jnp.array([[2.0, 0.0, 0.0], [0.0, 0.0, 0.0], [5.0, 1.0, 0.0]])
      >>> round(layer(logits, jnp.array([0, 1, 255])).item(), 4)
      0.2496

    References:
      The `FocalLossLayer` of [zimenglan-sysu-512/Focal-Loss](
      https://github.com/zimenglan-sysu-512/Focal-Loss), after Caffe's `SoftmaxWithLoss`.
    """

    alpha: float = 0.25
    gamma: float = 2.0
    axis: int = 1
    ignore_label: int | None = None
    normalization: str = "valid"
    loss_weight: float = 1.0
    return_prob: bool = False

    def __post_init__(self):
        """Refuse options that no input could make good."""
        if self.normalization not in _NORMALIZATIONS:
            raise _checks.InputError(
                f"normalization: got {self.normalization!r}, wanted one of {_NORMALIZATIONS}"
            )
        names = ("alpha", "gamma", "axis", "ignore_label")
        options = {name: getattr(self, name) for name in names}
        static_options(softmax_focal_loss_with_integer_labels, options)
        if not isinstance(self.loss_weight, numbers.Real):
            loss_weight(self.loss_weight, jnp.dtype(jnp.float32))

    def __call__(self, logits: ArrayLike, labels: ArrayLike) -> Array | tuple[Array, Array]:
        """Return the weighted loss; with `return_prob`, `(loss, prob)`.

        Args:
          logits: `[..., C, ...]`, floating: the layer's first bottom.
          labels: real, as many as there are positions, in their order: for logits
            `[N, C, H, W]` usually `[N, H, W]` or `[N, 1, H, W]`. Floating labels are
            truncated, as Caffe does. One outside `[0, C)` that is not `ignore_label` makes
            the loss NaN, where Caffe reads out of bounds.

        Returns:
          A scalar, float32 for 16-bit logits, else of the logits' dtype; and the softmax,
          of the logits' shape and dtype.

        Raises:
          ValueError: for another number of labels, or logits, an axis or a gamma that
            `focal_jax.softmax_focal_loss_with_integer_labels` refuses.
        """
        logits, labels = _checks.array("logits", logits), class_indices("labels", labels)
        axis = _checks.axis(self.axis, logits.ndim)
        positions = logits.shape[:axis] + logits.shape[axis + 1 :]
        if labels.size != math.prod(positions):
            raise _checks.InputError(
                f"labels: got {labels.size} of shape {labels.shape}, wanted "
                f"{math.prod(positions)} of shape {positions}: one for each position of logits "
                f"of shape {logits.shape} with the class axis {self.axis}"
            )
        labels = labels.reshape(positions)
        losses = softmax_focal_loss_with_integer_labels(
            logits,
            labels,
            alpha=self.alpha,
            gamma=self.gamma,
            axis=axis,
            ignore_label=self.ignore_label,
        )
        outer = math.prod(logits.shape[:axis])
        loss = self.loss_weight * reduce_loss(
            losses,
            normalization=outer if self.normalization == "batch_size" else self.normalization,
            labels=labels,
            ignore_label=self.ignore_label,
        )
        if not self.return_prob:
            return loss
        return loss, jax.nn.softmax(lax.stop_gradient(logits), axis)

    @classmethod
    def from_prototxt(cls, text: str, name: str | None = None) -> "FocalLossLayer":
        """Read the layer from a prototxt.

        Args:
          text: a layer or a whole net, in protobuf's text format. Other layers are passed
            over, whatever they hold, and so are fields of Caffe's that change nothing here.
          name: the name of the layer, where the text has several of type FocalLoss.

        Raises:
          ValueError: for text that is malformed or has an unknown normalization, no
            FocalLoss layer or several to choose from, or one that has a field which Caffe
            does not know, is of the type LINEAR, or is to propagate down to its labels.
        """
        layer = _find(text, name)
        if any(layer.propagate_down[1:]):
            raise _checks.InputError(
                f"text: layer {layer.name!r} has propagate_down true for its labels, wanted "
                "false: the layer cannot backpropagate to label inputs"
            )
        options = {
            field.name: value
            for part in (layer.focal_loss_param, layer.softmax_param, layer.loss_param)
            for field, value in part.ListFields()
        }
        if _ENUMS["FocalLossType"][options.pop("type", 0)] != "ORIGIN":
            raise _checks.InputError(
                f"text: layer {layer.name!r} has type LINEAR, wanted ORIGIN, the focal loss itself"
            )
        # The older of the two options counts only where the newer is absent.
        legacy = "VALID" if options.pop("normalize", True) else "BATCH_SIZE"
        mode = options.pop("normalization", _MODES.index(legacy))
        return cls(
            **options,
            normalization=_NORMALIZATIONS[mode],
            loss_weight=next(iter(layer.loss_weight), 1.0),
            return_prob=len(layer.top) > 1,
        )

    def to_prototxt(self) -> str:
        """Return the layer as a prototxt, every option written out.

        `from_prototxt` makes the same layer of it again; Caffe reads it in a net that has
        blobs `logits` and `labels`.
        """
        tops = 2 if self.return_prob else 1
        layer = _Layer(
            name="loss",
            type="FocalLoss",
            bottom=["logits", "labels"],
            top=["loss", "prob"][:tops],
            loss_weight=[self.loss_weight, 0][:tops],
            focal_loss_param={"alpha": self.alpha, "gamma": self.gamma},
            softmax_param={"axis": self.axis},
            loss_param={
                "ignore_label": self.ignore_label,
                "normalization": self.normalization.upper(),
            },
        )
        return text_format.MessageToString(_Layer(layer=[layer]))
