"""llama.cpp's side of cpu_decode.py, run by a Python of its own that has llama-cpp-python and nothing of this project.

Arguments: a GGUF file with the weights, and the type that they are turned into. Then one JSON object a line on
standard input, and one on standard output for each: {"start": [[token, ...], ...], "threads": n} computes prompts,
{"step": true} one more token of each. Answers have the milliseconds that it took, and the tokens chosen.
"""

import ctypes
import json
import os
import sys
import tempfile
import time

import llama_cpp
import numpy as np

TYPES = {
    "F16": llama_cpp.LLAMA_FTYPE_MOSTLY_F16,
    "Q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0,
    "Q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0,
}
CONTEXT, BATCH = 16384, 2048


@llama_cpp.llama_log_callback
def quiet(level, text, data):
    """Nothing but errors."""
    if level == 4:
        sys.stderr.write(text.decode(errors="replace"))


def converted(source, kind, folder):
    """The same weights as another type; Q4_1 and the like are read as numbers first."""
    target = os.path.join(folder, f"{kind}.gguf")
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.allow_requantize = TYPES[kind], True
    if llama_cpp.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(params)):
        sys.exit(f"llama.cpp could not turn {source} into {kind}")
    return target


class Model:
    """A model with one context, and the sequences that it computes."""

    def __init__(self, path):
        self._model = llama_cpp.llama_model_load_from_file(path.encode(), llama_cpp.llama_model_default_params())
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch, params.n_seq_max = CONTEXT, BATCH, 512, 8
        params.kv_unified = True
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        if not self._context:
            sys.exit(f"llama.cpp could not load {path}")
        self._vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._batch = llama_cpp.llama_batch_init(BATCH, 0, 1)
        self._lengths, self._latest = [], []

    def start(self, prompts, threads):
        """Forget everything, compute the prompts."""
        llama_cpp.llama_set_n_threads(self._context, threads, threads)
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)
        self._lengths = [0] * len(prompts)
        self._latest = [self._compute({s: prompt})[0] for s, prompt in enumerate(prompts)]

    def step(self):
        """One more token of each sequence."""
        self._latest = self._compute({s: [token] for s, token in enumerate(self._latest)})

    @property
    def tokens(self):
        """What was chosen last."""
        return self._latest

    def _compute(self, tokens):
        """Tokens of each sequence; the likeliest next ones."""
        batch, count, wanted = self._batch, 0, []
        for sequence, ids in tokens.items():
            for i, token in enumerate(ids):
                batch.token[count], batch.pos[count] = token, self._lengths[sequence] + i
                batch.n_seq_id[count], batch.seq_id[count][0] = 1, sequence
                batch.logits[count] = i == len(ids) - 1
                count += 1
            wanted.append(count - 1)
            self._lengths[sequence] += len(ids)
        batch.n_tokens = count
        if llama_cpp.llama_decode(self._context, batch):
            sys.exit("llama_decode failed")
        rows = (llama_cpp.llama_get_logits_ith(self._context, place) for place in wanted)
        return [int(np.ctypeslib.as_array(row, (self._vocabulary,)).argmax()) for row in rows]


def main():
    """Answer one line after another."""
    source, kind = sys.argv[1:]
    llama_cpp.llama_log_set(quiet, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    with tempfile.TemporaryDirectory() as folder:
        path = converted(source, kind, folder)
        model = Model(path)
        print(json.dumps({"version": llama_cpp.__version__, "bytes": os.path.getsize(path)}), flush=True)
        for line in sys.stdin:
            command = json.loads(line)
            before = time.perf_counter()
            model.start(command["start"], command["threads"]) if "start" in command else model.step()
            print(json.dumps({"ms": (time.perf_counter() - before) * 1e3, "tokens": model.tokens}), flush=True)


if __name__ == "__main__":
    main()
