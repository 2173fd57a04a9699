"""The Swift example: every file parses, and speaks of what a package holds."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import tree_sitter
import tree_sitter_swift

from mlx_vae import AutoencoderKL

pytestmark = pytest.mark.coreml

EXAMPLE = Path(__file__).parent.parent / "examples" / "swift"
FILES = sorted(EXAMPLE.rglob("*.swift"))


def mistakes(source: bytes) -> list[str]:
    """Where the grammar finds an error or misses something: line and kind."""
    parser = tree_sitter.Parser(tree_sitter.Language(tree_sitter_swift.language()))
    found, nodes = [], [parser.parse(source).root_node]
    while nodes:
        node = nodes.pop()
        if node.is_error or node.is_missing:
            found.append(f"line {node.start_point[0] + 1}: {node.type}")
        nodes.extend(node.children)
    return found


@pytest.mark.parametrize("path", FILES, ids=[path.name for path in FILES])
def test_parses(path: Path) -> None:
    assert mistakes(path.read_bytes()) == []


def test_readme_parses() -> None:
    blocks = re.findall(r"```swift\n(.*?)```", (EXAMPLE / "README.md").read_text(), flags=re.DOTALL)
    assert blocks
    assert [mistakes(block.encode()) for block in blocks] == [[]] * len(blocks)


def test_the_grammar_finds_mistakes() -> None:
    assert mistakes(b"func f( { return 1 }")


def test_names_are_those_of_a_package(vae: AutoencoderKL, tmp_path: Path) -> None:
    from packages import written

    _, package = written(tmp_path / "a.mlpackage", vae, io="image")
    used = {key for path in FILES for key in re.findall(r'"(mlx_vae\.\w+)"', path.read_text())}
    assert {"mlx_vae.input", "mlx_vae.output", "mlx_vae.sizes", "mlx_vae.functions", "mlx_vae.scale"} <= used
    assert used <= package.metadata.keys()
    assert package.metadata["mlx_vae.part"] == "decoder"
    assert package.metadata["mlx_vae.io"] == "image"
    assert package.metadata["mlx_vae.input"] == package.spec.description.input[0].name
    assert package.metadata["mlx_vae.output"] == package.spec.description.output[0].name


def test_names_are_those_of_a_latent_file(tmp_path: Path) -> None:
    import json

    import mlx.core as mx

    from mlx_vae.latents import Latents, save_latents

    path = tmp_path / "latents.safetensors"
    save_latents(path, Latents(mx.zeros((1, 2, 3, 4)), scaled=True, height=16, width=24))
    header = json.loads(path.read_bytes()[8:].split(b"}}")[0] + b"}}")
    source = "".join(file.read_text() for file in FILES)
    assert 'named: "latents"' in source
    assert header["latents"]["shape"] == [1, 2, 3, 4]
    assert 'metadata["scaled"] == "true"' in source
    assert header["__metadata__"]["scaled"] == "true"
