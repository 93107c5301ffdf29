"""Blocks shared by all towers: attention, MLP, embeddings, norms, and how layers are stacked.

Dropout is active exactly when the caller supplies a ``dropout`` random stream, so no flag has to
travel through the modules: training passes one, evaluation and the momentum teacher do not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mplug_jax.models.axes import constrain, constrain_rows

Array = jax.Array
KeysValues = tuple[Array, Array]

# The same finite constant everywhere: a row whose keys are all masked stays finite (uniform).
MASKED = -1e9

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
}


def kernel_init(std: float, *axes: str) -> Any:
    """Normal(0, std) initialiser that names the kernel's logical axes."""
    return nn.with_logical_partitioning(nn.initializers.normal(std), axes)


def zeros_init(*axes: str) -> Any:
    """Zero initialiser that names the logical axes."""
    return nn.with_logical_partitioning(nn.initializers.zeros_init(), axes)


def layer_norm(eps: float, name: str | None = None) -> nn.LayerNorm:
    """LayerNorm computed in float32 whatever the compute type."""
    return nn.LayerNorm(
        epsilon=eps,
        dtype=jnp.float32,
        scale_init=nn.with_logical_partitioning(nn.initializers.ones_init(), ("embed",)),
        bias_init=zeros_init("embed"),
        name=name,
    )


def rms_norm() -> nn.RMSNorm:
    """RMSNorm over a head's channels, computed in float32 whatever the compute type."""
    scale = nn.with_logical_partitioning(nn.initializers.ones_init(), ("kv",))
    return nn.RMSNorm(dtype=jnp.float32, scale_init=scale)


class Dropout(nn.Module):
    """Dropout that acts only while a ``dropout`` random stream is given."""

    rate: float

    @nn.compact
    def __call__(self, x: Array) -> Array:
        return nn.Dropout(self.rate, deterministic=not self.has_rng("dropout"))(x)


class Attention(nn.Module):
    """Multi-head attention with biases, split so that keys and values can be shared or cached.

    Shapes: queries ``[N, T, D]``, key side ``[B, S, D]`` with N a multiple of B: the N/B
    consecutive queries rows of one key row (beams of an image, say) share its keys and values.
    ``gain`` scales the initial values and outputs. ``qk_norm`` brings each head's queries and keys
    to a root mean square that is learnt (Dehghani et al. 2023, "Scaling vision transformers to 22
    billion parameters", section 2.1).
    """

    width: int
    heads: int
    dropout: float = 0.0
    init_std: float = 0.02
    dtype: Any = jnp.float32
    gain: float = 1.0
    qk_norm: bool = False

    def setup(self) -> None:
        def projection(std: float) -> nn.DenseGeneral:
            return nn.DenseGeneral(
                (self.heads, self.width // self.heads),
                dtype=self.dtype,
                kernel_init=kernel_init(std, "embed", "heads", "kv"),
                bias_init=zeros_init("heads", "kv"),
            )

        std = self.init_std
        self.query, self.key, self.value = map(projection, (std, std, self.gain * std))
        self.out = nn.DenseGeneral(
            self.width,
            axis=(-2, -1),
            dtype=self.dtype,
            kernel_init=kernel_init(self.gain * std, "heads", "kv", "embed"),
            bias_init=zeros_init("embed"),
        )
        self.attention_dropout = Dropout(self.dropout)
        if self.qk_norm:
            self.query_norm, self.key_norm = rms_norm(), rms_norm()

    def keys_values(self, x: Array) -> KeysValues:
        """Keys and values ``[B, heads, S, head_dim]`` of ``x [B, S, D]``."""
        keys, values = (
            constrain(project(x), "batch", None, "heads", None)
            for project in (self.key, self.value)
        )
        if self.qk_norm:
            keys = self.key_norm(keys).astype(self.dtype)
        return keys.swapaxes(1, 2), values.swapaxes(1, 2)

    def attend(self, x: Array, keys_values: KeysValues, mask: Array | None) -> Array:
        """Attention of ``x [N, T, D]`` over given keys and values.

        Args:
          mask: bool, broadcastable to ``[B, 1, T or 1, S]``, True where a key may be seen.

        Returns:
          ``[N, T, D]``.
        """
        keys, values = keys_values
        queries = constrain(self.query(x), "batch", None, "heads", None)
        if self.qk_norm:
            queries = self.query_norm(queries).astype(self.dtype)
        n, t, heads, head_dim = queries.shape
        b = keys.shape[0]
        # Rows that share keys become more query positions of the same row: nothing is tiled.
        queries = queries.reshape(b, n // b * t, heads, head_dim).swapaxes(1, 2)
        logits = jnp.einsum("bhqd,bhkd->bhqk", queries / head_dim**0.5, keys)
        logits = logits.astype(jnp.float32)
        if mask is not None:
            if n != b and mask.shape[-2] != 1:
                mask = jnp.tile(mask, (1, 1, n // b, 1))
            logits = jnp.where(mask, logits, MASKED)
        weights = self.attention_dropout(jax.nn.softmax(logits, axis=-1).astype(self.dtype))
        mixed = jnp.einsum("bhqk,bhkd->bhqd", weights, values)
        mixed = mixed.swapaxes(1, 2).reshape(n, t, heads, head_dim)
        return constrain_rows(self.out(constrain(mixed, "batch", None, "heads", None)))

    def __call__(self, x: Array, memory: Array, mask: Array | None = None) -> Array:
        """``attend`` over the keys and values of ``memory [B, S, D]``."""
        return self.attend(x, self.keys_values(memory), mask)


class MLP(nn.Module):
    """Two dense layers with an activation between."""

    width: int
    mlp_dim: int
    activation: str = "gelu"
    init_std: float = 0.02
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = nn.Dense(
            self.mlp_dim,
            dtype=self.dtype,
            kernel_init=kernel_init(self.init_std, "embed", "mlp"),
            bias_init=zeros_init("mlp"),
            name="up",
        )(x)
        x = ACTIVATIONS[self.activation](constrain(x, "batch", None, "mlp"))
        x = nn.Dense(
            self.width,
            dtype=self.dtype,
            kernel_init=kernel_init(self.init_std, "mlp", "embed"),
            bias_init=zeros_init("embed"),
            name="down",
        )(x)
        return constrain_rows(x)


class Residual(nn.Module):
    """A sub-layer's residual connection in BERT's order ('post') or before it ('pre').

    post: ``norm(x + dropout(f(x)))``; pre: ``x + dropout(f(norm(x)))``.
    """

    norm: str
    eps: float
    dropout: float
    dtype: Any = jnp.float32

    def setup(self) -> None:
        self.layer_norm = layer_norm(self.eps)
        self.output_dropout = Dropout(self.dropout)

    def inputs(self, x: Array) -> Array:
        """What the sub-layer reads of the stream ``x``."""
        return self.layer_norm(x).astype(self.dtype) if self.norm == "pre" else x

    def add(self, x: Array, y: Array) -> Array:
        """The stream ``x`` with what the sub-layer made of it."""
        x = x + self.output_dropout(y)
        return x if self.norm == "pre" else self.layer_norm(x).astype(self.dtype)

    def __call__(self, x: Array, sublayer: Callable[[Array], Array]) -> Array:
        return self.add(x, sublayer(self.inputs(x)))


def whole_words(embedding: Array) -> Array:
    """``[vocab, D]`` with every word whole on its device, for look-ups and logits.

    A table that is split in D would be looked up there, and then ``[B, L, D]`` be moved about.
    """
    return constrain(embedding, "vocab", None)


class TextEmbeddings(nn.Module):
    """BERT's embeddings: word + position + token type 0, LayerNorm, dropout."""

    vocab_size: int
    width: int
    max_positions: int
    type_vocab_size: int = 2
    eps: float = 1e-12
    dropout: float = 0.1
    init_std: float = 0.02
    dtype: Any = jnp.float32

    def setup(self) -> None:
        def table(rows: int, axis: str) -> nn.Embed:
            init = kernel_init(self.init_std, axis, "embed")
            return nn.Embed(rows, self.width, dtype=self.dtype, embedding_init=init)

        self.word = table(self.vocab_size, "vocab")
        self.position = table(self.max_positions, "position")
        self.token_type = table(self.type_vocab_size, "token_type")
        self.layer_norm = layer_norm(self.eps)
        self.output_dropout = Dropout(self.dropout)

    def __call__(self, ids: Array, offset: Array | int = 0) -> Array:
        """Embeds ``ids [B, L]`` at positions ``offset + 0..L-1``; returns ``[B, L, D]``."""
        length = ids.shape[1]
        if length > self.max_positions:
            raise ValueError(
                f"A text of {length} tokens does not fit the {self.max_positions} positions of the "
                "model; raise config.model.text.max_positions or shorten config.data.text_length."
            )
        positions = offset + jnp.arange(length)
        words = jnp.take(whole_words(self.word.embedding.astype(self.dtype)), ids, axis=0)
        x = constrain_rows(words + self.token_type(jnp.zeros_like(ids)))
        x = x + self.position(positions)[None]
        return self.output_dropout(self.layer_norm(x).astype(self.dtype))


class LMHead(nn.Module):
    """BERT's prediction head: dense, GELU, LayerNorm, then the tied word embeddings and a bias."""

    vocab_size: int
    width: int
    eps: float = 1e-12
    init_std: float = 0.02
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, embedding: Array) -> Array:
        """Logits ``[N, L, vocab]`` in float32 of ``x [N, L, D]`` and ``embedding [vocab, D]``."""
        x = nn.Dense(
            self.width,
            dtype=self.dtype,
            kernel_init=kernel_init(self.init_std, "embed", "embed_out"),
            bias_init=zeros_init("embed"),
            name="transform",
        )(x)
        x = ACTIVATIONS["gelu"](constrain_rows(x))
        x = layer_norm(self.eps, name="layer_norm")(x).astype(self.dtype)
        bias = self.param("bias", zeros_init("vocab"), (self.vocab_size,))
        logits = jnp.einsum(
            "...d,vd->...v",
            x,
            whole_words(embedding.astype(self.dtype)),
            preferred_element_type=jnp.float32,
        )
        return constrain(logits, "batch", None, "vocab") + bias


_POLICIES: dict[str, Callable[..., bool] | None] = {
    "full": None,
    "dots": jax.checkpoint_policies.dots_saveable,
    "dots_no_batch": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def rematerialised(block: type[nn.Module], policy: str, in_scan: bool = False) -> type[nn.Module]:
    """``block`` with its activations recomputed in the backward pass under a named policy."""
    if policy == "none":
        return block
    return nn.remat(block, policy=_POLICIES[policy], prevent_cse=not in_scan)


def layer_stack(
    block: type[nn.Module],
    depth: int,
    remat: str,
    unroll: int,
    methods: Mapping[str, Sequence[Any]],
) -> type[nn.Module]:
    """``depth`` copies of ``block`` as one scan, parameters stacked on a leading 'layers' axis.

    Args:
      remat: named policy; ``unroll``: layers per loop iteration.
      methods: for each scanned method, taking (carry, *args) and returning (carry, output), how
        each of args is passed: ``nn.broadcast``, or 0 for one slice a layer.
    """
    shared = {
        "variable_axes": {"params": 0, "intermediates": 0},
        "split_rngs": {"params": True, "dropout": True},
        "length": depth,
        "unroll": min(unroll, depth),
        "metadata_params": {nn.PARTITION_NAME: "layers"},
    }
    return nn.scan(
        rematerialised(block, remat, in_scan=True),
        methods={name: {"in_axes": tuple(axes), **shared} for name, axes in methods.items()},
    )
