"""`LLM`: a model that answers."""

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from foveal.cache import PAGE_SIZE, CacheManager, CacheUsage, most_pages
from foveal.cache.store import CacheStore, plan_cache
from foveal.config import ModelConfig
from foveal.config.formats import SNAPSHOTS_EACH
from foveal.config.model import GQAConfig, MLAConfig
from foveal.engine.engine import Engine
from foveal.engine.graphs import CudaCapture, DecodeGraphs, GraphLimits
from foveal.engine.look import LayerSight, layer_sights, sparse_layers
from foveal.engine.memory import CacheDemand, cache_size
from foveal.engine.outputs import RequestOutput
from foveal.engine.params import SamplingParams
from foveal.engine.request import Request
from foveal.engine.runner import Runner
from foveal.engine.scheduler import Scheduler
from foveal.models.decoder import Decoder
from foveal.models.load import dtype_name, generation_defaults, load_model
from foveal.models.resolve import resolve_model
from foveal.models.tokenizer import load_tokenizer

Prompt = str | Mapping[str, Any]
"""Text, or {"prompt_token_ids": [...]}, with its text as "prompt" if that should be in the output."""
Messages = Sequence[Mapping[str, Any]]
"""A conversation: [{"role": "user", "content": "..."}, ...]."""

# What the logits of prompts whose log probabilities are asked for may take in one step, as float32.
_PROMPT_LOGIT_BYTES = 2**28


class LLM:
    """A model with its tokenizer, cache and engine.

    >>> llm = LLM("smollm2")  # doctest: +SKIP
    >>> llm.generate("The capital of France is", SamplingParams(temperature=0))[0].outputs[0].text  # doctest: +SKIP
    ' Paris...'

    `model` is a directory, a .gguf file, a Hub id or an alias; or a `Decoder`, which stays as it is: options of
    loading (`dtype`, `device`, `index_dtype`, `mla_form`, `quantization`, `adapter`, `streaming`) are then not for
    here, and it needs its `tokenizer` or `skip_tokenizer_init`. `dtype` (of the weights; "auto": the checkpoint's),
    `kv_cache_dtype` (of latents) and `index_dtype` (of index keys) are names or torch dtypes; torch.float8_e4m3fn is
    "fp8". `mla_form`: how latent attention is computed: "expanded", "absorbed", or "auto", the cheaper one for each
    sequence. `quantization`: "int8" or "int4" rounds the weights while they are loaded; activations keep their dtype
    (CPU only; see `Decoder.quantise`). `adapter`: a directory with indexers for a dense model (`foveal train`).
    `streaming`: "4+1020" lets attention see the first 4 tokens and the last 1020 alone, without end (StreamingLLM).
    `max_model_len`: most tokens of a prompt and its completion (None: the model's). `max_num_seqs` sequences
    run at a time, and a step computes at most `max_num_batched_tokens` tokens. `kv_cache_memory`: bytes of the cache
    (None: a share of the memory that is free, and no more than `max_num_seqs` sequences of `max_model_len` tokens
    need). `enable_prefix_caching`: keep what was computed for prompts that begin alike; of recurrent layers that is the
    state at a few page boundaries. `seed`: for requests without
    one; the same requests in the same order give the same tokens. `enforce_eager`: leave the weights as they are
    instead of packing them for speed (`Decoder.pack`), and on a GPU, no CUDA graphs. `tokenizer`: one that is loaded
    already (None: the model's own).
    `skip_tokenizer_init`: no tokenizer at all: token ids in, token ids out.

    Raises ValueError for a value out of range, and where the model or the cache does not fit in memory.
    """

    def __init__(
        self,
        model: str | Path | Decoder,
        *,
        dtype: str | torch.dtype = "auto",
        device: str | torch.device = "cpu",
        max_model_len: int | None = None,
        max_num_seqs: int = 64,
        max_num_batched_tokens: int = 2048,
        kv_cache_memory: int | None = None,
        enable_prefix_caching: bool = True,
        kv_cache_dtype: str | torch.dtype = "auto",
        index_dtype: str | torch.dtype = "auto",
        mla_form: str = "auto",
        quantization: str | None = None,
        adapter: str | Path | None = None,
        streaming: str | None = None,
        seed: int = 0,
        enforce_eager: bool = False,
        tokenizer: Any = None,
        skip_tokenizer_init: bool = False,
    ) -> None:
        index_name = dtype_name(index_dtype)
        loading: dict[str, Any] = {
            "dtype": dtype,
            "device": device,
            "index_dtype": index_name,
            "mla_form": mla_form,
            "quantization": quantization,
            "adapter": adapter,
            "streaming": streaming,
        }
        if isinstance(model, Decoder):
            _check_loaded(loading, tokenizer is not None or skip_tokenizer_init)
            decoder, path = model, None
            device, index_name = model.embed_tokens.weight.device, model.options.index_dtype
        else:
            path = resolve_model(str(model))
            tokenizer = None if skip_tokenizer_init else tokenizer or _tokenizer(path)
            decoder = load_model(path, **loading)
            if not enforce_eager:
                decoder.pack()
        self.tokenizer = None if skip_tokenizer_init else tokenizer
        config = decoder.config
        length = _model_length(max_model_len, config.max_positions)
        plan = plan_cache(config, decoder.options.dtype, dtype_name(kv_cache_dtype), index_name)
        snapshots = SNAPSHOTS_EACH * max_num_seqs if enable_prefix_caching else 0
        held = PAGE_SIZE * most_pages(length, max_num_batched_tokens, plan.window, plan.sinks)
        demand = CacheDemand(max_num_seqs, held, whole=max_model_len is not None, snapshots=snapshots)
        size = cache_size(plan, demand, kv_cache_memory, device)
        reach: dict[str, Any] = {"window": plan.window, "sinks": plan.sinks}
        manager = CacheManager(size.pages, size.slots, prefix_caching=enable_prefix_caching, **reach)
        scheduler = Scheduler(
            manager,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            max_prompt_rows=max(1, _PROMPT_LOGIT_BYTES // (config.vocab_size * torch.float32.itemsize)),
            **reach,
        )
        store = CacheStore(plan, size.pages, size.slots, device)
        graphs = None
        if torch.device(device).type == "cuda" and not enforce_eager:
            limits = GraphLimits(max_num_seqs, -(-length // PAGE_SIZE))
            graphs = DecodeGraphs(
                lambda batch: decoder.step(batch, store).logits_LV, limits, device, CudaCapture(device)
            )
        runner = Runner(decoder, store, manager, device=device, sparse=sparse_layers(config), graphs=graphs)
        self.engine = Engine(
            runner,
            manager,
            scheduler,
            vocab_size=config.vocab_size,
            max_model_len=length,
            eos_ids=_eos_ids(path, config),
            tokenizer=self.tokenizer,
            seed=seed,
            plain_rope=_plain_rope(config),
        )
        self._cache_plan = plan
        self._added = 0
        self._inbox: dict[str, deque[RequestOutput]] = {}

    @property
    def usage(self) -> CacheUsage:
        """How full the cache is."""
        return self.engine.usage

    @property
    def layer_sights(self) -> tuple[LayerSight, ...]:
        """What each of the model's mixers can see."""
        return layer_sights(self._cache_plan.config)

    def cache_bytes(self, tokens: int) -> int:
        """What the cache holds for one sequence of so many tokens, in whole pages."""
        plan = self._cache_plan
        pages = -(-tokens // PAGE_SIZE)
        if plan.window is not None:
            pages = min(pages, -(-plan.sinks // PAGE_SIZE) + -(-plan.window // PAGE_SIZE) + 1)
        return pages * plan.page_bytes + plan.slot_bytes

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """Complete the prompts, all of them together; an output for each, in their order.

        One SamplingParams for all, or one for each. A prompt that is too long gets an output with an `error`. Raises
        ValueError, before anything is computed, for a prompt or parameter that makes no sense.
        """
        several = [prompts] if isinstance(prompts, str | Mapping) else list(prompts)
        if sampling_params is None or isinstance(sampling_params, SamplingParams):
            params = [sampling_params or SamplingParams()] * len(several)
        else:
            params = list(sampling_params)
        if len(params) != len(several):
            raise ValueError(f"sampling_params has {len(params)} entries for {len(several)} prompts")
        requests = [self._request(prompt, one) for prompt, one in zip(several, params, strict=True)]
        final = {output.request_id: output for output in self._run(requests)}
        return [final[request.id] for request in requests]

    def stream(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> Iterator[RequestOutput]:
        """Complete one prompt, with an output after every step that brought a token.

        As in vLLM each output says everything so far: text and tokens are cumulative. Text that may begin a stop
        string or is half a character waits for the next output. Closing the iterator ends the request.
        """
        request = self._request(prompt, sampling_params or SamplingParams(), stream=True)
        return self._run([request])

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """Answer a conversation, or each of several. Raises ValueError where the tokenizer has no chat template."""
        several = [messages] if messages and isinstance(messages[0], Mapping) else messages
        return self.generate([self.chat_prompt(one) for one in several], sampling_params)  # type: ignore[arg-type]

    def chat_prompt(self, messages: Messages) -> Prompt:
        """The prompt that asks for the next message of a conversation, for `generate` and `stream`."""
        return chat_prompt(self._text_tokenizer(), messages)

    def _run(self, requests: Sequence[Request]) -> Iterator[RequestOutput]:
        for request in requests:
            self.engine.check(request)
        try:
            for request in requests:
                self._inbox[request.id] = deque()
                self.engine.add(request)
            yield from self._outputs({request.id for request in requests})
        finally:
            # Also where the caller closes the iterator or presses Ctrl-C.
            for request in requests:
                self.engine.abort(request.id)
                self._inbox.pop(request.id, None)

    def _outputs(self, ids: set[str]) -> Iterator[RequestOutput]:
        """The requests' outputs until all are finished; those of other iterators are kept for them."""
        open_ids = set(ids)
        while open_ids:
            if not any(self._inbox[one] for one in open_ids):
                self._deliver(self.engine.step())
            for one in sorted(open_ids):
                while self._inbox[one]:
                    output = self._inbox[one].popleft()
                    if output.finished:
                        open_ids.discard(one)
                    yield output

    def _deliver(self, outputs: Iterable[RequestOutput]) -> None:
        for output in outputs:
            if output.request_id in self._inbox:
                self._inbox[output.request_id].append(output)

    def _request(self, prompt: Prompt, params: SamplingParams, *, stream: bool = False) -> Request:
        text, ids = self._read_prompt(prompt)
        request = Request(str(self._added), ids, params, prompt=text, stream=stream)
        self._added += 1
        return request

    def _read_prompt(self, prompt: Prompt) -> tuple[str | None, list[int]]:
        if isinstance(prompt, str):
            return prompt, list(self._text_tokenizer().encode(prompt))
        if not isinstance(prompt, Mapping) or not {"prompt_token_ids"} <= set(prompt) <= {"prompt", "prompt_token_ids"}:
            raise ValueError(f'a prompt must be text or {{"prompt_token_ids": [...]}}, not {prompt!r}')
        ids = prompt["prompt_token_ids"]
        if not isinstance(ids, Sequence) or not all(type(token) is int for token in ids):
            raise ValueError(f"prompt_token_ids must be a list of token ids, not {ids!r}")
        return prompt.get("prompt"), list(ids)

    def _text_tokenizer(self) -> Any:
        if self.tokenizer is None:
            raise ValueError("text needs a tokenizer, and skip_tokenizer_init = True left it out")
        return self.tokenizer


def chat_prompt(tokenizer: Any, messages: Messages, **variables: Any) -> dict[str, Any]:
    """`LLM.chat_prompt` before there is an LLM; the template sees the `variables`. Raises ValueError where the
    tokenizer has no chat template."""
    text = chat_text(tokenizer, messages, **variables)
    # The template has written the special tokens.
    return {"prompt": text, "prompt_token_ids": tokenizer.encode(text, add_special_tokens=False)}


def chat_text(tokenizer: Any, messages: Messages, **variables: Any) -> str:
    """The text of `chat_prompt`."""
    return str(tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True, **variables))


def _tokenizer(path: Path) -> Any:
    return load_tokenizer(path)  # typed by transformers, whose decode may give lists of texts


def _model_length(asked: int | None, most: int) -> int:
    if asked is None:
        return most
    if not 2 <= asked <= most:
        raise ValueError(f"max_model_len must be from 2 to the model's {most} positions, not {asked!r}")
    return asked


def _check_loaded(loading: dict[str, Any], has_tokenizer: bool) -> None:
    """Refuse what a model that is loaded already cannot be given any more."""
    plain = {"dtype": "auto", "device": "cpu", "index_dtype": "auto", "mla_form": "auto"}
    for name, value in loading.items():
        if value != plain.get(name):
            raise ValueError(f"{name} = {value!r} is for loading a model, and this one is loaded already")
    if not has_tokenizer:
        raise ValueError("a model that is loaded already needs its tokenizer, or skip_tokenizer_init = True")


def _eos_ids(path: Path | None, config: ModelConfig) -> list[int]:
    """End-of-sequence ids of both config files; chat models often have more of them in generation_config.json."""
    eos = None if path is None else generation_defaults(path).get("eos_token_id")
    more = eos if isinstance(eos, list) else [] if eos is None else [eos]
    if not all(type(token) is int for token in more):
        raise ValueError(f"generation_config.json: 'eos_token_id' must be a token id or a list of them, not {eos!r}")
    return sorted({*config.eos_token_ids, *more})


def _plain_rope(config: ModelConfig) -> int | None:
    """The length up to which `dynamic` rope is not scaled; None: no layer has it."""
    ropes = [block.operation.rope for block in config.blocks if isinstance(block.operation, GQAConfig | MLAConfig)]
    lengths = [rope.scaling.original_max_positions for rope in ropes if rope and rope.scaling.kind == "dynamic"]
    return min(lengths, default=None)
