"""What `make test` does about the browser that some tests need."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / ".ci" / "browser"
TOOLS = ("bash", "env", "id", "mktemp", "tail", "rm", "cat")


@pytest.fixture
def run(tmp_path):
    """Run the script where only these commands exist, beside the most basic ones."""

    def run(**commands):
        folder = tmp_path / "bin"
        folder.mkdir()
        for name in TOOLS:
            found = shutil.which(name)
            assert found is not None
            (folder / name).symlink_to(found)
        for name, text in commands.items():
            command = folder / name.replace("_", "-")
            command.unlink(missing_ok=True)
            command.write_text(f"#!{folder}/bash\n{text}\n")
            command.chmod(0o755)
        environment = {**os.environ, "PATH": str(folder), "TMPDIR": str(tmp_path)}
        command = [str(folder / "bash"), str(SCRIPT)]
        return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)

    return run


def test_a_browser_that_is_there_is_taken(run):
    done = run(chromium="exit 1", apt_get="exit 1")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_without_apt_it_says_what_is_missing(run):
    done = run()
    assert done.returncode == 0
    assert "cannot be installed from here: there is no apt-get." in done.stderr
    assert "apt-get install -y chromium" in done.stderr


def test_without_root_it_says_what_is_missing(run):
    done = run(apt_get="exit 0", id="echo 1000", sudo="exit 1")
    assert done.returncode == 0
    assert "you are not root, and sudo asks for a password" in done.stderr


@pytest.mark.parametrize("user", [0, 1000])
def test_it_is_installed_by_root_or_by_sudo_without_a_password(run, tmp_path, user):
    note = f'echo "$@" >>{tmp_path}/calls'
    done = run(apt_get=note, id=f"echo {user}", sudo='[ "$1" = -n ] && shift; "$@"')
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "calls").read_text().splitlines() == [
        "update",
        "install -y --no-install-recommends chromium",
    ]


def test_a_failed_installation_shows_why(run):
    done = run(apt_get="echo no network; exit 100", id="echo 0")
    assert done.returncode == 0
    assert "no network" in done.stderr
    assert "apt-get failed" in done.stderr
