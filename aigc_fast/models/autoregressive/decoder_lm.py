"""A decoder-only language model on the library's ops."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aigc_fast import ops
from aigc_fast.io.tokenizer import TextTokenizer, save_tokenizer
from aigc_fast.nn import Linear, QuantizedLinear
from aigc_fast.nn._replacing import runs_as_written
from aigc_fast.ops._checks import check_class

from .arguments import check_token_ids
from .cache import KVCache
from .config import DecoderConfig
from .fused_step import FusedStep
from .layers import DecoderLayer, Norm, Step
from .load_gguf import read_gguf_model
from .load_hf import from_hf_state_dict, read_hf_model
from .rotary_tables import RotaryTables
from .save_hf import save_hf_model

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class DecoderLM(nn.Module):
    """A decoder-only language model of any architecture that `DecoderConfig` can describe.

    Without a cache it is an ordinary differentiable module. With one, only the new tokens are
    computed, and no gradient goes through the layers.

    >>> model = DecoderLM.from_pretrained("model.gguf", dtype=torch.bfloat16)
    >>> cache = model.new_cache(batch_size=1, capacity=256)
    >>> logits = model(prompt, cache)       # (1, prompt length, vocab_size)
    >>> logits = model(next_token, cache)   # (1, 1, vocab_size)
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        check_class("config", config, DecoderConfig)
        self.config = config
        #: bos_token_id, eos_token_id and pad_token_id, those that the model's file has
        self.special_token_ids: dict[str, Any] = {}
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        if config.learned_positions:
            self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, i) for i in range(config.num_layers))
        self.norm = Norm(config, config.hidden_size, config.norm)
        self.lm_head: nn.Module | None = None  # the embedding itself
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        self._rotary = RotaryTables(config)
        self._fused: FusedStep | None = None
        self._looked_at_layers = False

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        dtype: torch.dtype = torch.float32,
        *,
        packed: bool = False,
        quantize_activations: bool = False,
    ) -> DecoderLM:
        """Reads a model from disk, onto the CPU.

        Args:
            path: a GGUF file, dequantised to `dtype`; or a Hugging Face folder: config.json and
                safetensors, which stay memory-mapped where they have that dtype and no fused
                weight is made of them. The architectures are those of architectures.py.
            dtype: of the weights: float32, bfloat16, float16 or float64.
            packed: keep the matrices of a GGUF file as codes of 4 or 8 bits, as `io.pack_gguf`
                does; for inference. A token then reads the bytes of the file, not those of dtype.
            quantize_activations: round the inputs of packed matrices to int8, in groups of 32:
                faster on a CPU, and what llama.cpp does.

        Raises:
            OSError: a file cannot be opened.
            ValueError: a file is unsound or describes a model of another kind, or `packed` is True
                for a folder.
            TypeError: `dtype` is not a floating-point dtype that the ops take.
        """
        if dtype not in _DTYPES:
            raise TypeError(f"dtype must be one of {_DTYPES}, got {dtype}")
        if os.path.isdir(path):
            if packed:
                raise ValueError(f"packed: {path} is a folder; only a GGUF file can stay packed")
            return cls._assemble(*read_hf_model(path, cls._empty, dtype))
        model = cls._assemble(*read_gguf_model(path, cls._empty, dtype, packed))
        for module in model.modules():
            if isinstance(module, QuantizedLinear):
                module.quantize_activations = quantize_activations
        return model

    @classmethod
    def from_hf_state_dict(
        cls, config: DecoderConfig, state: Mapping[str, Tensor], architecture: str = "llama"
    ) -> DecoderLM:
        """Builds the model from the state dict of a transformers model.

        Args:
            state: `model.layers.0.self_attn.q_proj.weight` and so on.
            architecture: transformers' `model_type`, which decides the names of the weights.

        Raises:
            ValueError: a tensor is missing or has another shape; there is no such architecture.
        """
        empty = cls._empty(config)
        return cls._assemble(empty, from_hf_state_dict(empty, state, architecture))

    def save_pretrained(
        self, folder: str | os.PathLike[str], tokenizer: TextTokenizer | None = None
    ) -> None:
        """Writes config.json, with `special_token_ids`, and model.safetensors, which
        `from_pretrained` and transformers' AutoModelForCausalLM read. `model_type` is the first of
        architectures.py that describes the model: a Mistral without windows is a Llama.

        Args:
            folder: created if needed. Files of these names are replaced once the new ones are
                complete; the model may have been read from there.
            tokenizer: what `io.load_tokenizer` gave; its files are written too.

        Raises:
            ValueError: the model has packed weights or replaced layers, or a config that none of
                the architectures has.
        """
        empty = self._empty(self.config).state_dict()
        save_hf_model(folder, self, {name: like.shape for name, like in empty.items()})
        if tokenizer is not None:
            save_tokenizer(tokenizer, folder)

    @classmethod
    def _empty(cls, config: DecoderConfig) -> DecoderLM:
        # On meta the module costs no memory; the tensors of the state dict become its own.
        with torch.device("meta"):
            return cls(config)

    @staticmethod
    def _assemble(model: DecoderLM, state: dict[str, Tensor]) -> DecoderLM:
        model.load_state_dict(state, assign=True)
        return model.eval()

    def new_cache(
        self,
        batch_size: int,
        capacity: int,
        dtype: torch.dtype | None = None,
        scales: Tensor | None = None,
    ) -> KVCache:
        """An empty cache on the model's device.

        Args:
            batch_size: sequences.
            capacity: most tokens of a sequence.
            dtype: of keys and values; None is that of the model.
            scales: float32 (2 * num_layers, num_kv_heads), for a cache of int8, which needs them,
                or of float8; see `calibrate_cache`.
        """
        weight = self.norm.weight
        return KVCache.empty(
            self.config,
            batch_size,
            capacity,
            dtype=weight.dtype if dtype is None else dtype,
            device=weight.device,
            scales=scales,
        )

    def __getstate__(self) -> dict[str, Any]:
        # A copy's modules are others than those that the step has looked at.
        return {**self.__dict__, "_fused": None}

    def forward(self, token_ids: Tensor, cache: KVCache | None = None) -> Tensor:
        """Scores of the next token after each of the given ones.

        Args:
            token_ids: int64 or int32 (batch, seq), seq at least 1.
            cache: what came before; the new tokens are added to it.

        Returns:
            (batch, seq, vocab_size) in the model's dtype.

        Raises:
            TypeError: `token_ids` is not an integer tensor.
            ValueError: `token_ids` has another shape, is empty, holds an id outside the
                vocabulary, or does not fit in the cache.
        """
        check_token_ids(token_ids, self.config)
        if cache is not None:
            check_class("cache", cache, KVCache)
        return self.logits(self.hidden_states(token_ids, cache))

    def loss(self, token_ids: Tensor, labels: Tensor | None = None, **options: Any) -> Tensor:
        """Cross-entropy of each token given those before it, for training and for perplexity,
        which is exp of it. The logits are never all in memory.

        Args:
            token_ids: int64 or int32 (batch, seq), seq at least 2.
            labels: int64 (batch, seq), the token to be predicted at each place, -100 for none;
                `token_ids` by default. (They are shifted here, as in transformers.)
            options: `reduction`, `label_smoothing`, `z_loss` and `ignore_index` of
                `ops.linear_cross_entropy`; "none" gives (batch, seq - 1).

        Returns:
            A scalar in float32 (float64 for float64), the mean over the labels that count.

        Raises:
            TypeError, ValueError: as `forward`, or for labels of another shape or dtype.
        """
        check_token_ids(token_ids, self.config)
        if "softcap" in options:
            raise TypeError("softcap is the model's own, config.logit_softcap")
        labels = token_ids.long() if labels is None else labels
        check_class("labels", labels, Tensor)
        if labels.shape != token_ids.shape or labels.shape[1] < 2:
            raise ValueError(
                "labels must have the shape of token_ids, (batch, seq) with at least 2 tokens, "
                f"got {tuple(labels.shape)} for {tuple(token_ids.shape)}"
            )
        hidden, labels = self.hidden_states(token_ids)[:, :-1], labels[:, 1:]
        head: Any = self.embed_tokens if self.lm_head is None else self.lm_head
        plain = head is self.embed_tokens or (
            type(head) in (nn.Linear, Linear) and runs_as_written(head)
        )
        if not plain:  # packed, with an adapter, with hooks
            return ops.cross_entropy(self.logits(hidden), labels, **options)
        if self.config.logits_scaling != 1.0:
            hidden = hidden / self.config.logits_scaling
        options["softcap"] = self.config.logit_softcap
        bias = getattr(head, "bias", None)
        return ops.linear_cross_entropy(hidden, head.weight, labels, linear_bias=bias, **options)

    def logits(self, hidden: Tensor) -> Tensor:
        """The output projection, (..., hidden_size) to (..., vocab_size)."""
        if self.lm_head is None:
            logits = ops.linear(hidden, self.embed_tokens.weight)
        else:
            logits = self.lm_head(hidden)
        if self.config.logits_scaling != 1.0:
            logits = logits / self.config.logits_scaling
        softcap = self.config.logit_softcap
        return logits if softcap is None else softcap * torch.tanh(logits / softcap)

    def hidden_states(self, token_ids: Tensor, cache: KVCache | None = None) -> Tensor:
        """The normalised states before the output projection, (batch, seq, hidden_size).

        Arguments as for `forward`, but ids outside the vocabulary are not noticed: looking would
        make a GPU wait at every token.
        """
        with torch.set_grad_enabled(cache is None and torch.is_grad_enabled()):
            fused = self._fused_step(token_ids, cache)
            if cache is not None and fused is not None:
                cache.check_room(*token_ids.shape)
                self._check_length(cache.used + 1)
                embedded = self._embed(token_ids[:, 0])
                tables = self._rotary.below(cache.capacity, cache.longest, self.norm.weight)
                hidden = fused(embedded, cache, tables)[:, None]
            else:
                hidden, step = self._enter(token_ids, cache)
                residual = None
                for layer in self.layers:
                    hidden, residual = layer(hidden, residual, step)
                hidden, _ = self.norm(hidden, residual)
            if cache is not None:
                cache.advance(token_ids.shape[1])
            return hidden

    def _fused_step(self, token_ids: Tensor, cache: KVCache | None) -> FusedStep | None:
        """All layers as one operator, or None where the layers or the call do not fit it."""
        if cache is None:
            return None
        # Looking at all layers takes a tenth of a step, whose weights have driven them out of the
        # processor's caches. So that is done once after a prompt.
        if token_ids.shape[1] != 1 or cache.used == 0:
            self._looked_at_layers = False
        if token_ids.shape[1] != 1:
            return None
        scaling = self.config.rope_scaling
        if scaling is not None and scaling.stretches(cache.used + 1):
            return None
        looked, self._looked_at_layers = self._looked_at_layers, True
        fused = self._fused
        if fused is None or not fused.has_its_dtype() or not (looked or fused.is_current()):
            self._fused = fused = FusedStep(self)
        return fused if fused.weights else None

    def _embed(self, token_ids: Tensor) -> Tensor:
        hidden = self.embed_tokens(token_ids)
        scale = self.config.embedding_scale
        return hidden if scale == 1.0 else hidden * scale

    def _enter(self, token_ids: Tensor, cache: KVCache | None) -> tuple[Tensor, Step]:
        """The embedded tokens and what the layers need to know of their positions."""
        batch, seq = token_ids.shape
        config = self.config
        hidden, length, ends, positions = self._embed(token_ids), seq, None, None
        if cache is not None:
            cache.check_room(batch, seq)
            length += cache.used
            # The tokens of a prompt are all there is: they attend to each other, not to the cache.
            if cache.used or seq == 1:
                ends = cache.lengths + seq
                positions = cache.lengths[:, None]
                if seq > 1:
                    positions = positions + torch.arange(seq, device=positions.device)
        self._check_length(length)

        def rows(table: Tensor) -> Tensor:
            # F.embedding is the gather with the least overhead, and takes int32 as it is.
            return table[:seq] if positions is None else F.embedding(positions, table)

        if config.learned_positions:
            return hidden + rows(self.embed_positions.weight), Step((), cache, ends)
        scaling, weight = config.rope_scaling, self.norm.weight
        if scaling is not None and scaling.stretches(length):
            where = torch.arange(seq, device=hidden.device) if positions is None else positions
            angles = self._rotary.at(where, length, weight)
        else:
            sizes = (cache.capacity, cache.longest) if cache else (seq, seq)
            tables = self._rotary.below(*sizes, weight)
            angles = tuple((rows(cos), rows(sin)) for cos, sin in tables)
        return hidden, Step(angles, cache, ends)

    def _check_length(self, length: int) -> None:
        if length > self.config.max_position_embeddings:
            raise ValueError(
                f"token_ids has {length} positions, above max_position_embeddings = "
                f"{self.config.max_position_embeddings}"
            )
