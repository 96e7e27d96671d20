"""A TransformerEngine that is found and does not import: named once, and hidden from Megatron-Core, which would use half of it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

# What an installation against another torch leaves: the outer package imports, its torch extension does not.
EXTENSION = "raise OSError('libtransformer_engine.so: undefined\\n symbol: _ZN3c10')"
PROGRAM = """
import json
from parallel.engine_import import import_engine
found = import_engine()
import parallel.mcore
from megatron.core.extensions import transformer_engine as of_megatron
try:
    import transformer_engine
    later = "imported"
except ImportError:
    later = "refused"
from megatron_minpro.cluster.facts import examine
findings = [finding.detail for finding in examine() if finding.subject == "transformer-engine"]
print(json.dumps([found.version, found.error, found.usable_version, of_megatron.HAVE_TE, later, findings]))
"""


@pytest.fixture(scope="module")
def half_installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packages")
    (folder / "transformer_engine" / "pytorch").mkdir(parents=True)
    (folder / "transformer_engine" / "__init__.py").write_text("")
    (folder / "transformer_engine" / "pytorch" / "__init__.py").write_text(EXTENSION)
    metadata = folder / "transformer_engine-2.20.2.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: transformer-engine\nVersion: 2.20.2\n")
    return folder


def test_a_half_installed_engine_is_one_line_and_unused(half_installed: Path) -> None:
    program = f"import sys; sys.path.insert(0, {str(half_installed)!r})\n{PROGRAM}"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    version, error, usable, megatron_has_it, later, findings = json.loads(done.stdout.splitlines()[-1])
    assert (version, usable, megatron_has_it, later) == ("2.20.2", None, False, "refused")
    assert error == "OSError: libtransformer_engine.so: undefined symbol: _ZN3c10"
    assert findings == [f"2.20.2 does not import ({error}); the local layers are used. Rebuild it for this torch, or remove it"]
