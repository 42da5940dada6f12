"""One process of llama.cpp for `beside_llama_cpp.py`, in a Python environment that may be llama.cpp's own.

    python benchmarks/llama_cpp_process.py convert FOLDER FILE
    python benchmarks/llama_cpp_process.py serve PORT
    python benchmarks/llama_cpp_process.py answer FILE CLIENTS TOKENS [PORT …]

`convert` writes the Llama of a Hugging Face checkpoint as a GGUF file, in float32. `serve` is one RPC server
with one thread, until the process is ended. `answer` loads a file for so many sequences of so many tokens
each, onto the RPC servers if there are some, prints `ready`, and answers each line of its standard input:

    in    {"prompts": [[token, …], …], "tokens": how many new ones, "never": a token that is not chosen}
    out   {"answers": [[token, …], …], "first_s": seconds to the first token, "total_s": to the last one}

It calls llama.cpp's own functions by the names that `llama-cpp-python` gives them, and not that package's
`Llama`, so that nothing else in Python is measured. Everything is in float32, keys and values too, and
attention is the plain one: so its answers can be compared token for token.
"""

from __future__ import annotations

import ctypes
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

_HOST = "127.0.0.1"
_PLAIN_ATTENTION = 0
_ROUND_TO = 256
"""llama.cpp rounds the length of a sequence up to so many tokens."""

_BLOCK_TENSORS = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_OTHER_TENSORS = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}


def gguf_name(name: str) -> str:
    """What GGUF calls a weight of a Hugging Face Llama.

    Raises:
        KeyError: a Llama has no such weight.
    """
    path = name.removesuffix(".weight")
    if path in _OTHER_TENSORS:
        return f"{_OTHER_TENSORS[path]}.weight"
    _, _, number, part = path.split(".", 3)
    return f"blk.{number}.{_BLOCK_TENSORS[part]}.weight"


def interleaved(weight: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """Reorder the rows of queries or keys `[heads * width, inputs]` for llama.cpp's rotary embedding.

    transformers turns the components i and i + width / 2 of a head together, llama.cpp 2i and 2i + 1.
    """
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(weight.shape))


def convert(folder: Path, file: Path) -> None:
    """Write a checkpoint of a Llama with plain rotary embeddings as one GGUF file in float32.

    Raises:
        ValueError: the model is another one.
    """
    config = json.loads((folder / "config.json").read_text())
    rope = config.get("rope_parameters") or {}
    if config["model_type"] != "llama" or rope.get("rope_type", "default") != "default":
        raise ValueError(f"{folder} is not a Llama with plain rotary embeddings")
    import gguf
    from safetensors import safe_open

    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config["hidden_size"] // heads)
    writer.add_rope_freq_base(rope.get("rope_theta") or config.get("rope_theta", 10_000.0))
    for shard in sorted(folder.glob("*.safetensors")):
        with safe_open(shard, "np") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - it is no dictionary
                weight = tensors.get_tensor(name).astype(np.float32)
                if ".q_proj." in name or ".k_proj." in name:
                    weight = interleaved(weight, heads if ".q_proj." in name else kv_heads)
                writer.add_tensor(gguf_name(name), weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _ggml() -> Any:
    """ggml's functions, those of its RPC backend among them.

    Raises:
        AttributeError: llama.cpp was built without `GGML_RPC`.
    """
    import llama_cpp

    ggml = ctypes.CDLL(str(Path(llama_cpp.__file__).parent / "lib" / "libggml.so"))
    pointer = ctypes.c_void_p
    ggml.ggml_backend_dev_by_type.argtypes, ggml.ggml_backend_dev_by_type.restype = [ctypes.c_int], pointer
    ggml.ggml_backend_reg_dev_get.argtypes = [pointer, ctypes.c_size_t]
    ggml.ggml_backend_reg_dev_get.restype = pointer
    ggml.ggml_backend_register.argtypes, ggml.ggml_backend_register.restype = [pointer], None
    add, start = ggml.ggml_backend_rpc_add_server, ggml.ggml_backend_rpc_start_server
    add.argtypes, add.restype = [ctypes.c_char_p], pointer
    start.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_size_t, pointer]
    start.restype = None
    return ggml


def serve(port: int) -> None:
    """Be an RPC server with one thread; it never returns."""
    ggml = _ggml()
    cpu = (ctypes.c_void_p * 1)(ggml.ggml_backend_dev_by_type(0))
    ggml.ggml_backend_rpc_start_server(f"{_HOST}:{port}".encode(), None, 1, 1, cpu)


class Answering:
    """A model that is loaded here, or onto RPC servers, and its memory of sequences."""

    def __init__(self, file: Path, clients: int, tokens: int, ports: list[int]) -> None:
        import llama_cpp

        self._lib = llama_cpp
        self._quiet = llama_cpp.llama_log_callback(_only_errors)  # kept, as C calls it
        llama_cpp.llama_log_set(self._quiet, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        wanted = llama_cpp.llama_model_default_params()
        if ports:
            self._devices = self._connect(ports)
            wanted.devices = ctypes.cast(self._devices, ctypes.c_void_p).value
            self._split = (ctypes.c_float * int(llama_cpp.llama_max_devices()))(*[1.0] * len(ports))
            wanted.tensor_split = self._split
        wanted.n_gpu_layers = 10_000 if ports else 0
        self._model = llama_cpp.llama_model_load_from_file(str(file).encode(), wanted)
        if not self._model:
            raise ValueError(f"llama.cpp cannot load {file}")
        context = llama_cpp.llama_context_default_params()
        context.n_ctx = clients * (-(-tokens // _ROUND_TO) * _ROUND_TO)
        context.n_seq_max = clients
        context.n_threads = context.n_threads_batch = 1
        context.type_k = context.type_v = llama_cpp.GGML_TYPE_F32
        context.flash_attn_type = _PLAIN_ATTENTION
        self._context = llama_cpp.llama_init_from_model(self._model, context)
        if not self._context:
            raise ValueError("llama.cpp has no memory for so many sequences")
        vocabulary = llama_cpp.llama_model_get_vocab(self._model)
        self._vocab_size = int(llama_cpp.llama_vocab_n_tokens(vocabulary))
        self._batch = llama_cpp.llama_batch_init(int(llama_cpp.llama_n_batch(self._context)), 0, 1)

    def _connect(self, ports: list[int]) -> Any:
        """The devices of the RPC servers, in order, with a null pointer behind them."""
        ggml, devices = _ggml(), []
        for port in ports:
            server = ggml.ggml_backend_rpc_add_server(f"{_HOST}:{port}".encode())
            if not server:
                raise ValueError(f"no RPC server answers at port {port}")
            ggml.ggml_backend_register(server)
            devices.append(ggml.ggml_backend_reg_dev_get(server, 0))
        return (ctypes.c_void_p * (len(devices) + 1))(*devices, None)

    def answer(self, prompts: list[list[int]], tokens: int, never: int) -> dict[str, Any]:
        """Greedy answers to all prompts at once, one batch a token."""
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), True)
        began = time.perf_counter()
        places = self._decode(
            [(row, at, token) for row, p in enumerate(prompts) for at, token in enumerate(p)]
        )
        answers = [[self._best(places[row], never)] for row in range(len(prompts))]
        first = time.perf_counter()
        for step in range(tokens - 1):
            places = self._decode(
                [(row, len(prompts[row]) + step, answer[-1]) for row, answer in enumerate(answers)]
            )
            for row, answer in enumerate(answers):
                answer.append(self._best(places[row], never))
        return {"answers": answers, "first_s": first - began, "total_s": time.perf_counter() - began}

    def _decode(self, new: list[tuple[int, int, int]]) -> dict[int, int]:
        """Run (sequence, position, token) in one batch; where the logits of each sequence's last one are."""
        batch = self._batch
        last = {row: place for place, (row, _, _) in enumerate(new)}
        batch.n_tokens = len(new)
        for place, (row, position, token) in enumerate(new):
            batch.token[place], batch.pos[place] = token, position
            batch.n_seq_id[place], batch.seq_id[place][0] = 1, row
            batch.logits[place] = last[row] == place
        if self._lib.llama_decode(self._context, batch):
            raise ValueError("llama.cpp could not compute a batch")
        return last

    def _best(self, place: int, never: int) -> int:
        pointer = self._lib.llama_get_logits_ith(self._context, place)
        logits = np.ctypeslib.as_array(pointer, (self._vocab_size,))
        logits[never] = -np.inf
        return int(logits.argmax())


def _only_errors(level: int, text: bytes, _: Any) -> None:
    if level == 4:
        sys.stderr.write(text.decode(errors="replace"))


def main() -> None:
    """Do what the arguments say."""
    does, *given = sys.argv[1:]
    if does == "convert":
        convert(Path(given[0]), Path(given[1]))
    elif does == "serve":
        serve(int(given[0]))
    else:
        file, clients, tokens, *ports = given
        answering = Answering(Path(file), int(clients), int(tokens), [int(port) for port in ports])
        print("ready", flush=True)
        for line in sys.stdin:
            print(json.dumps(answering.answer(**json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
