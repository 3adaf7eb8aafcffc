"""The FocalLoss layer of Caffe, and its prototxt."""

import difflib
import math
import numbers
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike

from focal_jax.compat._arguments import check_calls, check_options, class_indices
from focal_jax.engine import arguments, checks
from focal_jax.engine.arguments import InputError, shown
from focal_jax.engine.options import Option, known_numbers
from focal_jax.losses.softmax import softmax_focal_loss_with_integer_labels
from focal_jax.reduction import reduce_loss

try:
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format
except ImportError as error:
    raise ImportError(
        f"protobuf is missing; install it in a checkout: pip install '.[compat]' ({error})"
    ) from error

__all__ = ["FocalLossLayer"]

# Caffe's words in the order of its enum values, as normalizations of `reduce_loss`. BATCH_SIZE
# depends on the shape of the logits.
_NORMALIZATIONS = {"full": "mean", "valid": "valid", "batch_size": None, "none": "sum"}
_MODES = tuple(word.upper() for word in _NORMALIZATIONS)
_PHASES = ("TRAIN", "TEST")
_ENUMS = {"NormalizationMode": _MODES, "FocalLossType": ("ORIGIN", "LINEAR"), "Phase": _PHASES}
_FLOAT32 = jnp.dtype(jnp.float32)
_ALPHA = Option("number", 0.25, low=0.0, above_low=True, per_class=True)
_MAX_RANK = 32  # of a blob

# The part of Caffe's schema that this module reads. A message `Layer` parses a layer and also a
# net, because it contains layers, and the only field that nets and layers share is the name.
_SCHEMA = {
    "FocalLossParameter": "optional FocalLossType type, repeated double alpha, "
    "optional double gamma, optional int32 axis, optional bool alpha_balance",
    "Rule": "optional Phase phase",
    "SoftmaxParameter": "optional int32 axis",
    "LossParameter": "optional int32 ignore_label, optional NormalizationMode normalization, "
    "optional bool normalize",
    "Layer": "optional string name, optional string type, repeated string bottom, "
    "repeated string top, repeated double loss_weight, repeated bool propagate_down, "
    "optional FocalLossParameter focal_loss_param, optional SoftmaxParameter softmax_param, "
    "optional LossParameter loss_param, repeated Layer layer, optional Phase phase, "
    "repeated Rule include, repeated Rule exclude",
}


def _layer_class() -> Any:
    """Return the message class `Layer` of the schema, in a separate descriptor pool."""
    file = descriptor_pb2.FileDescriptorProto(name="layer.proto", package="focal_jax")
    for enum_name, values in _ENUMS.items():
        enum = file.enum_type.add(name=enum_name)
        for number, value in enumerate(values):
            enum.value.add(name=value, number=number)
    for message_name, fields in _SCHEMA.items():
        message = file.message_type.add(name=message_name)
        for number, field in enumerate(fields.split(", "), 1):
            label, kind, name = field.split()
            kind = {"type": f"TYPE_{kind.upper()}"} if kind.islower() else {"type_name": kind}
            message.field.add(name=name, number=number, label=f"LABEL_{label.upper()}", **kind)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("focal_jax.Layer"))


_Layer = _layer_class()

# Valid fields of a Caffe layer, by message. The fields that are listed here have no effect.
_KNOWN_FIELDS = {
    "": {"param", "blobs", "transform_param"},
    "focal_loss_param": {"beta", "engine"},  # beta is an option of the type LINEAR
    "softmax_param": {"engine"},
    "loss_param": set(),
}
for _path, _names in _KNOWN_FIELDS.items():
    _message = _Layer.DESCRIPTOR.fields_by_name[_path].message_type if _path else _Layer.DESCRIPTOR
    _names.update(field.name for field in _message.fields)


def _fields(text: str) -> Iterator[tuple[int, str, str, str]]:
    """Yield the layer, message, name and position of every field of a well-formed text.

    Layers are numbered from 1 in the order of the text. Fields outside a layer have the number 0.
    """
    tokens: Any = text_format.Tokenizer(text.split("\n"))  # as `text_format.Parse`
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
            last, in_layer = token, path[:1] == ["layer"]
            message = ".".join(path[in_layer:])
            yield layer * in_layer, message, token, f"{at.GetLine()}:{at.GetColumn()}"


def _check_fields(text: str, layer: int) -> None:
    """Raise for unknown fields in a layer, because protobuf's parser skips a misspelled option."""
    for number, message, name, position in _fields(text):
        if number != layer or message not in _KNOWN_FIELDS or name in _KNOWN_FIELDS[message]:
            continue
        known = sorted(_KNOWN_FIELDS[message])
        close = difflib.get_close_matches(name, known, 1)
        raise InputError(
            f"text: at line:column {position} got an unknown field {name!r} in "
            f"{message or 'the FocalLoss layer'}, wanted {close[0] if close else f'one of {known}'}"
        )


def _is_in(phase: str | None, layer: Any) -> bool:
    """Return whether a net has the layer in the phase, according to the phases of its rules."""
    if phase is None:
        return True

    def matches(rule, default):
        return _PHASES[rule.phase] == phase.upper() if rule.HasField("phase") else default

    excluded = any(matches(rule, False) for rule in layer.exclude)
    included = any(matches(rule, True) for rule in layer.include) or not layer.include
    return matches(layer, True) and included and not excluded


def _find_layer(text: str, name: str | None, phase: str | None) -> Any:
    """Return the FocalLoss layer of the text that has the name and the phase, if they are given."""
    if not isinstance(text, str):
        raise InputError(f"text: got {shown(text)}, wanted a string in protobuf's text format")
    if not isinstance(name, str | None):
        raise InputError(f"name: got {shown(name)}, wanted None or a string")
    if phase is not None and not (isinstance(phase, str) and phase.upper() in _PHASES):
        raise InputError(f"phase: got {shown(phase)}, wanted None or one of {_PHASES}")
    text = text.removeprefix("\ufeff")  # the byte order mark of some editors
    try:
        net = text_format.Parse(text, _Layer(), allow_unknown_field=True)
    except text_format.ParseError as error:
        raise InputError(
            f"text: at line:column {error} Wanted a layer or a net in protobuf's text format, "
            f"with a normalization of {', '.join(_MODES)}"
        ) from error
    except RecursionError:
        raise InputError("text: got messages that are nested too deeply, wanted a net") from None
    layers = [(i, x) for i, x in enumerate((net, *net.layer)) if x.type == "FocalLoss"]
    if not layers:
        near = [x.type for x in (net, *net.layer) if "focal" in x.type.lower()]
        raise InputError(f"text: got no FocalLoss layer{f', but {near}' * bool(near)}, wanted one")
    found = [(i, x) for i, x in layers if name in (None, x.name) and _is_in(phase, x)]
    if len(found) != 1:
        raise InputError(
            f"name: got {name!r}, wanted the name of one of the FocalLoss layers, "
            f"{[layer.name for _, layer in layers]}; phase='TRAIN' or phase='TEST' distinguishes "
            "layers of the same name"
        )
    index, layer = found[0]
    _check_fields(text, index)
    if len(layer.bottom) not in (0, 2) or len(layer.top) > 2:
        raise InputError(
            f"text: layer {layer.name!r} has the bottoms {list(layer.bottom)} and the tops "
            f"{list(layer.top)}, wanted two bottoms and at most two tops"
        )
    if len(layer.loss_weight) not in (0, max(1, len(layer.top))):
        raise InputError(
            f"text: layer {layer.name!r} has {len(layer.loss_weight)} values of loss_weight, "
            "wanted one for each top"
        )
    if any(x.type == "Softmax" and set(x.top) & set(layer.bottom[:1]) for x in net.layer):
        warnings.warn(
            f"text: layer {layer.name!r} gets {layer.bottom[0]!r} from a Softmax layer, wanted "
            "logits: the FocalLoss layer applies a softmax itself",
            stacklevel=3,
        )
    return layer


@check_calls
@dataclass(frozen=True)
class FocalLossLayer:
    r"""Compute Caffe's FocalLoss layer: softmax, focal loss and normalization.

        loss = loss_weight * sum(-alpha (1 - p_t)**gamma log p_t) / max(1, normalizer)

    The gradient is exact where the original loses precision: as `p_t` approaches 1, and where
    `p_t` underflows.

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

    Attributes:
      alpha: the weight of every class, or a sequence with one weight for each class; above 0.
      gamma: focusing exponent.
      axis: the class axis.
      ignore_label: positions with this label have loss 0 and gradient 0.
      normalization: the normalizer, in Caffe's words. `"full"` is the number of all positions,
        `"valid"` the number of positions that are not ignored, `"batch_size"` the product of the
        axes before the class axis (`focal_jax.reduce_loss` uses the first axis), `"none"` is 1.
      loss_weight: a factor on the loss.
      return_prob: whether to return the softmax too, the layer's second top. It has no gradient.

    References:
      The `FocalLossLayer` of [zimenglan-sysu-512/Focal-Loss](
      https://github.com/zimenglan-sysu-512/Focal-Loss).
    """

    alpha: float | Sequence[float] = 0.25
    gamma: float = 2.0
    axis: int = 1
    ignore_label: int | None = None
    normalization: str = "valid"
    loss_weight: float = 1.0
    return_prob: bool = False

    def __post_init__(self):
        """Raise for options that are invalid for every input."""
        word = self.normalization
        if not isinstance(word, str) or word not in _NORMALIZATIONS:
            got = f"normalization: got {shown(word)}"
            raise InputError(f"{got}, wanted one of {tuple(_NORMALIZATIONS)}")
        _ALPHA.check("alpha", self.alpha)
        check_options(softmax_focal_loss_with_integer_labels, alpha=self.alpha, gamma=self.gamma)
        for name, most in (("alpha", 1), ("gamma", 0), ("loss_weight", 0)):
            value = getattr(self, name)
            checks.check_known_numbers(name, value, _FLOAT32, -math.inf)
            shape = arguments.number_array(name, value, _FLOAT32).shape
            if len(shape) > most or 0 in shape:
                wanted = "one number" + ", or one per class" * most
                raise InputError(f"{name}: got shape {shape}, wanted {wanted}")
            known = known_numbers(value, name, "numbers")
            if known is not None:  # hashable and comparable, unless it is traced
                value = tuple(known.tolist()) if known.size > 1 else known.item()
                object.__setattr__(self, name, value)
        is_integer = isinstance(self.axis, numbers.Integral) and not isinstance(self.axis, bool)
        if not is_integer or not -_MAX_RANK <= self.axis < _MAX_RANK:
            raise InputError(f"axis: got {shown(self.axis)}, wanted an integer in [-32, 32)")
        object.__setattr__(self, "ignore_label", arguments.static_ignore_label(self.ignore_label))
        arguments.static_bool("return_prob", self.return_prob)

    def __call__(self, logits: ArrayLike, labels: ArrayLike) -> Array | tuple[Array, Array]:
        """Return the loss; with `return_prob`, return `(loss, prob)`.

        Args:
          logits: `[..., C, ...]`, floating: the first bottom of the layer.
          labels: real, one label per position, in any shape: `[N, H, W]` and `[N, 1, H, W]` for
            logits `[N, C, H, W]`. Floating labels are truncated, as in Caffe. An invalid label
            makes the loss NaN; Caffe reads out of bounds.

        Returns:
          A scalar; and the softmax, of the logits' shape and dtype.
        """
        logits = arguments.as_array("logits", logits)
        axis = arguments.static_axis(self.axis, logits.ndim)
        labels = class_indices("labels", labels, logits.shape[axis], self.ignore_label)
        positions = logits.shape[:axis] + logits.shape[axis + 1 :]
        if labels.size != math.prod(positions):
            raise InputError(
                f"labels: got {labels.size} of shape {labels.shape}, wanted "
                f"{math.prod(positions)} of shape {positions}: one label per position of logits "
                f"of shape {logits.shape} with the class axis {self.axis}"
            )
        labels, ignore_label = labels.reshape(positions), self.ignore_label
        options = {"alpha": self.alpha, "gamma": self.gamma, "ignore_label": ignore_label}
        losses = softmax_focal_loss_with_integer_labels(logits, labels, axis=axis, **options)
        count = jnp.asarray(math.prod(logits.shape[:axis]), jnp.float32)
        normalization = _NORMALIZATIONS[self.normalization] or count
        loss = self.loss_weight * reduce_loss(
            losses, normalization=normalization, labels=labels, ignore_label=ignore_label
        )
        if not self.return_prob:
            return loss
        return loss, jax.nn.softmax(lax.stop_gradient(logits), axis)

    @classmethod
    def from_prototxt(
        cls, text: str, name: str | None = None, phase: str | None = None
    ) -> "FocalLossLayer":
        """Read the layer from a prototxt.

        Args:
          text: a layer or a net in protobuf's text format. Other layers are ignored, and so are
            fields that do not change the result of this layer.
          name: the name of the layer, if the text has several FocalLoss layers.
          phase: `"TRAIN"` or `"TEST"`, if the text has a layer of the same name for each phase.

        Warns:
          UserWarning: the first bottom is the top of a Softmax layer.

        Raises:
          InputError: if the text is malformed, does not identify one FocalLoss layer, or its layer
            has an unknown field, the type LINEAR, `propagate_down` true for the labels, or a number
            of bottoms or tops that Caffe rejects.
        """
        layer = _find_layer(text, name, phase)
        if any(layer.propagate_down[1:]):
            raise InputError(
                f"text: layer {layer.name!r} has propagate_down true for its labels, wanted "
                "false: the layer cannot backpropagate to label inputs"
            )
        options = {
            field.name: value
            for message in (layer.softmax_param, layer.focal_loss_param, layer.loss_param)
            for field, value in message.ListFields()
        }
        if layer.softmax_param.HasField("axis") and options["axis"] != layer.softmax_param.axis:
            raise InputError(f"text: layer {layer.name!r} has two axes, wanted one")
        alpha = list(options.pop("alpha", [0.25]))
        # Forks of Caffe with one alpha for each class ignore them if `alpha_balance` is false.
        alpha = alpha if options.pop("alpha_balance", True) else [1.0]
        if _ENUMS["FocalLossType"][options.pop("type", 0)] != "ORIGIN":
            raise InputError(f"text: layer {layer.name!r} has type LINEAR, wanted ORIGIN")
        # Caffe reads the older option `normalize` only if `normalization` is absent.
        legacy = "VALID" if options.pop("normalize", True) else "BATCH_SIZE"
        mode = options.pop("normalization", _MODES.index(legacy))
        return cls(
            **options,
            alpha=alpha[0] if len(alpha) == 1 else tuple(alpha),
            normalization=_MODES[mode].lower(),
            loss_weight=next(iter(layer.loss_weight), 1.0),
            return_prob=len(layer.top) > 1,
        )

    def to_prototxt(self) -> str:
        """Return the layer as a prototxt with every option.

        `from_prototxt` returns an equal layer. Caffe reads the text in a net with the blobs
        `logits` and `labels`.
        """
        tops = 2 if self.return_prob else 1
        layer = _Layer(
            name="loss",
            type="FocalLoss",
            bottom=["logits", "labels"],
            top=["loss", "prob"][:tops],
            loss_weight=[self.loss_weight, 0][:tops],
            focal_loss_param={"alpha": np.ravel(self.alpha).tolist(), "gamma": self.gamma},
            softmax_param={"axis": self.axis},
            loss_param={
                "ignore_label": self.ignore_label,
                "normalization": self.normalization.upper(),
            },
        )
        return text_format.MessageToString(_Layer(layer=[layer]))
