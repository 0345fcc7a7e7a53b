"""A hub on loopback: it answers what huggingface_hub asks when a plan looks models and data sets up.

It serves headers of SmolLM2's real shapes, and no weights; and, whole, the folders that it is given.
"""

import json
import struct
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from hashlib import sha1, sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SIZES = {"SmolLM2-135M": (576, 1536, 30, 9, 3), "SmolLM2-360M": (960, 2560, 32, 15, 5)}
VOCABULARY = 49152


def shapes(name: str) -> dict[str, list[int]]:
    """Return the tensors of a released SmolLM2, by name."""
    width, hidden, blocks, heads, kv_heads = SIZES[name.removesuffix("-Instruct")]
    size = width // heads
    found = {"model.embed_tokens.weight": [VOCABULARY, width], "model.norm.weight": [width]}
    for block in range(blocks):
        at = f"model.layers.{block}."
        found |= {
            f"{at}self_attn.q_proj.weight": [width, width],
            f"{at}self_attn.k_proj.weight": [kv_heads * size, width],
            f"{at}self_attn.v_proj.weight": [kv_heads * size, width],
            f"{at}self_attn.o_proj.weight": [width, width],
            f"{at}mlp.gate_proj.weight": [hidden, width],
            f"{at}mlp.up_proj.weight": [hidden, width],
            f"{at}mlp.down_proj.weight": [width, hidden],
            f"{at}input_layernorm.weight": [width],
            f"{at}post_attention_layernorm.weight": [width],
        }
    return found


def file_bytes(repository: str, file: str) -> bytes | None:
    """Return a file of a repository: its config, or the header of its weights."""
    name = repository.partition("/")[2]
    if name.removesuffix("-Instruct") not in SIZES:
        return None
    width, hidden, blocks, heads, kv_heads = SIZES[name.removesuffix("-Instruct")]
    if file == "config.json":
        config = {
            "model_type": "llama",
            "hidden_size": width,
            "intermediate_size": hidden,
            "num_hidden_layers": blocks,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "vocab_size": VOCABULARY,
            "tie_word_embeddings": True,
        }
        return json.dumps(config).encode()
    if file == "model.safetensors":
        header, place = {}, 0
        for key, shape in shapes(name).items():
            size = 2 * shape[0] * (shape[1] if len(shape) > 1 else 1)
            header[key] = {"dtype": "BF16", "shape": shape, "data_offsets": [place, place + size]}
            place += size
        text = json.dumps(header).encode()
        return struct.pack("<Q", len(text)) + text
    return None


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, *, with_body: bool) -> None:
        parts = self.path.partition("?")[0].strip("/").split("/")
        headers = {"X-Repo-Commit": COMMIT}
        data: bytes | None
        folders: Mapping[str, Path] = self.server.folders  # type: ignore[attr-defined]
        name = "/".join([each for each in parts if each not in ("api", "models", "datasets")][:2])
        if name in folders:
            headers["X-Repo-Commit"] = commit_of(name)
            data = _from_folder(name, folders[name], parts)
            headers["ETag"] = f'"{sha256(data or b"").hexdigest()}"'
        elif parts[:2] == ["api", "models"] or parts[:2] == ["api", "datasets"]:
            known = parts[3].startswith("SmolLM2-") if parts[1] == "models" else parts[3] in ("smol-smoltalk", "bbh")
            siblings = [{"rfilename": "config.json"}, {"rfilename": "model.safetensors"}]
            told = {"id": f"{parts[2]}/{parts[3]}", "sha": COMMIT, "siblings": siblings, "private": False, "tags": []}
            data = json.dumps(told | {"downloads": 0, "gated": False, "disabled": False}).encode() if known else None
        else:
            data = file_bytes("/".join(parts[:2]), "/".join(parts[4:])) if len(parts) > 4 else None
            headers["ETag"] = '"0123456789"'
        status = 200 if data is not None else 404
        if data is None:
            data, headers["X-Error-Code"] = b"{}", "EntryNotFound" if name in folders else "RepoNotFound"
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if with_body:
            self.wfile.write(data)


def commit_of(name: str) -> str:
    """Return the commit that a folder is served as."""
    return sha1(name.encode()).hexdigest()


def _from_folder(name: str, folder: Path, parts: list[str]) -> bytes | None:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    names = [path.relative_to(folder).as_posix() for path in files]
    if parts[0] != "api":
        found = folder / "/".join(parts[parts.index("resolve") + 2 :])
        return found.read_bytes() if found.is_file() else None
    if "tree" in parts:
        sizes = [path.stat().st_size for path in files]
        entries = [{"type": "file", "path": n, "size": s, "oid": "0" * 40} for n, s in zip(names, sizes, strict=True)]
        return json.dumps(entries).encode()
    told = {"id": name, "sha": commit_of(name), "private": False, "tags": [], "gated": False, "disabled": False}
    return json.dumps(told | {"downloads": 0, "siblings": [{"rfilename": each} for each in names]}).encode()


@contextmanager
def serve_hub(folders: Mapping[str, Path] | None = None) -> Iterator[str]:
    """Serve on a free port of loopback while the context lasts, folders too by ``ORG/NAME``; gives the address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.folders = folders or {}  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
