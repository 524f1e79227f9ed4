"""Scripts without a `__main__` guard train with workers, with the very losses that they have without us."""

import json
import textwrap

import pytest

from conftest import python, rocm_patch

RUN = ("run", "-q", "--backend", "cpu", "--conv", "native")

IMPORTS = """
import argparse, collections, dataclasses, enum, functools, os, sys, typing
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info
torch.set_num_threads(1)
"""
TRAIN = """
def train(loader, epochs=2):
    torch.manual_seed(1)
    model = torch.nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    for epoch in range(epochs):
        for x, y in loader:
            loss = (model(x) - y).square().mean()
            optimizer.zero_grad(); loss.backward(); optimizer.step()
            print(f"{loss.item():.17g} {loss.dtype}")
"""
POINTS = """
class Points(Dataset):
    def __init__(self, n=12): self.x = torch.arange(3.0 * n).view(n, 3) / (3 * n)
    def __len__(self): return len(self.x)
    def __getitem__(self, i): return self.x[i], self.x[i].sum() + float(torch.rand(()))
"""
# The bodies of scripts; each ends by printing losses.
SHAPES = {
    "top_level_loop": """
        from torch.utils.data import TensorDataset
        torch.manual_seed(0)
        x = torch.randn(12, 3)
        model = torch.nn.Linear(3, 1)
        for x, y in DataLoader(TensorDataset(x, x.sum(1)), batch_size=4, num_workers=2, shuffle=True):
            print((model(x) - y).square().mean().item())
        """,
    "class_in_main": f"{POINTS}{TRAIN}torch.manual_seed(0)\ntrain(DataLoader(Points(), 4, num_workers=2))",
    "functions": f"""{POINTS}{TRAIN}
SCALE = 3
def scaled(point): return twice(point[0] * SCALE), point[1]
def twice(x): return 2 * x
def collate(points): return [torch.stack(part) for part in zip(*map(scaled, points))]
def main():
    torch.manual_seed(0)
    train(DataLoader(Points(), 4, num_workers=2, collate_fn=collate))
SCALE = 4
main()
""",
    "argparse": f"""{POINTS}{TRAIN}
parser = argparse.ArgumentParser()
parser.add_argument("--batch", type=int, required=True)
arguments = parser.parse_args(["--batch", "3"] if len(sys.argv) == 1 else None)
torch.manual_seed(0)
train(DataLoader(Points(), arguments.batch, num_workers=2, worker_init_fn=lambda w: sys.stderr.write("worker\\n")))
""",
    "dataclass": f"""{POINTS}{TRAIN}
@dataclasses.dataclass(frozen=True)
class Settings:
    factor: float = 2.0
    names: tuple = ("x", "y")
class Kind(enum.Enum):
    PLAIN, SCALED = 1, 2
Pair = collections.namedtuple("Pair", "x y")
class Configured(Points):
    def __init__(self, settings, kind): super().__init__(); self.settings, self.kind = settings, kind
    def __getitem__(self, i):
        x, y = super().__getitem__(i)
        assert self.kind is Kind.SCALED and isinstance(self.settings, Settings)
        return Pair(x * self.settings.factor, y)
torch.manual_seed(0)
loader = DataLoader(Configured(Settings(), Kind.SCALED), 4, num_workers=2)
assert isinstance(next(iter(loader)), Pair)
train(loader)
""",
    "custom_batch_class": f"""{POINTS}{TRAIN}
class Batch:
    def __init__(self, points): self.parts = [torch.stack(part) for part in zip(*points)]
    def __iter__(self): return iter(self.parts)
torch.manual_seed(0)
loader = DataLoader(Points(), 4, num_workers=2, collate_fn=Batch)
assert type(next(iter(loader))) is Batch
train(loader)
""",
    "exception_in_the_worker": f"""{POINTS}
class NoSuchPoint(Exception):
    pass
class Few(Points):
    def __getitem__(self, i):
        if i == 3: raise NoSuchPoint(f"point {{i}}")
        return super().__getitem__(i)
try:
    for batch in DataLoader(Few(), 1, num_workers=2): pass
except NoSuchPoint as error:
    text = str(error)
    print(type(error), "Original Traceback" in text, "in __getitem__" in text, text.splitlines()[-1])
""",
    "float64": f"""{POINTS}{TRAIN}
torch.set_default_dtype(torch.float64)
torch.manual_seed(0)
train(DataLoader(Points(), 4, num_workers=2))
""",
    "iterable_dataset": f"""{TRAIN}
class Stream(IterableDataset):
    def __iter__(self):
        info = get_worker_info()
        for n in range(info.id, 12, info.num_workers): yield torch.full((3,), float(n)) / 12, float(n)
train(DataLoader(Stream(), 3, num_workers=2))
""",
    "transforms": f"""{POINTS}{TRAIN}
class Compose:
    def __init__(self, *steps): self.steps = steps
    def __call__(self, x): return functools.reduce(lambda value, step: step(value), self.steps, x)
class Transformed(Points):
    def __init__(self, transform): super().__init__(); self.transform = transform
    def __getitem__(self, i): x, y = super().__getitem__(i); return self.transform(x), y
def offset(by):
    def shift(x): return x + by
    return shift
torch.manual_seed(0)
train(DataLoader(Transformed(Compose(lambda x: x * 2, offset(0.5), torch.nn.Dropout(0.5))), 4, num_workers=2))
""",
}


def scripted(body):
    return IMPORTS + textwrap.dedent(body)


@pytest.mark.parametrize("shape", SHAPES)
def test_unguarded_scripts_have_the_losses_that_they_have_without_us(tmp_path, shape):
    path = tmp_path / "train.py"
    path.write_text(scripted(SHAPES[shape]))
    plain = python(str(path)).stdout
    assert plain
    done = rocm_patch(*RUN, str(path))
    assert done.stdout == plain
    assert "forked" not in done.stderr, done.stderr
    if shape == "argparse":
        assert done.stderr.splitlines().count("worker") == 4  # two in each epoch


def test_a_guarded_script_has_the_same_losses(tmp_path):
    body = SHAPES["float64"]
    top, bottom = body.split("torch.set_default_dtype")
    path = tmp_path / "train.py"
    indented = textwrap.indent("torch.set_default_dtype" + bottom, "    ")
    path.write_text(scripted(top) + "if __name__ == '__main__':\n" + indented)
    unguarded = tmp_path / "unguarded.py"
    unguarded.write_text(scripted(body))
    losses = rocm_patch(*RUN, str(unguarded)).stdout
    assert "float64" in losses
    assert rocm_patch(*RUN, str(path)).stdout == losses
    assert rocm_patch(*RUN, "--start-method", "spawn", str(path)).stdout == losses


@pytest.mark.parametrize("how", ["-m", "-c", "stdin", "symlink", "folder"])
def test_however_the_script_is_started(tmp_path, how):
    text = scripted(SHAPES["custom_batch_class"])
    path = tmp_path / "train.py"
    path.write_text(text)
    plain = python(str(path)).stdout
    if how == "-m":
        done = rocm_patch(*RUN, "-m", "train", cwd=tmp_path)
    elif how == "-c":
        done = rocm_patch(*RUN, "-c", text)
    elif how == "stdin":
        done = rocm_patch(*RUN, "-", input=text)
    elif how == "symlink":
        link = tmp_path / "elsewhere" / "linked.py"
        link.parent.mkdir()
        link.symlink_to(path)
        done = rocm_patch(*RUN, str(link))
    else:
        (tmp_path / "program").mkdir()
        (tmp_path / "program" / "__main__.py").write_text(text)
        done = rocm_patch(*RUN, str(tmp_path / "program"))
    assert done.stdout == plain and done.stderr == ""


def test_a_notebook(tmp_path):
    """Executed by a real kernel: cells define the dataset, make the loader and train."""
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    path = tmp_path / "train.py"
    text = scripted(SHAPES["custom_batch_class"])
    path.write_text(text)
    plain = python(str(path)).stdout
    setup, rest = text.split("class Points")
    notebook = nbformat.v4.new_notebook()
    first = "from rocm_patch import enable_all_patches\nstatus = enable_all_patches(backend='cpu', conv='native')\n"
    cells = [first + setup, "class Points" + rest.split("torch.manual_seed(0)\nloader")[0]]
    cells.append("torch.manual_seed(0)\nloader" + rest.split("torch.manual_seed(0)\nloader")[1])
    notebook.cells = [nbformat.v4.new_code_cell(cell) for cell in cells]
    nbclient.NotebookClient(notebook, timeout=120, kernel_name="python3", resources={}).execute(cwd=str(tmp_path))
    outputs = [output for cell in notebook.cells for output in cell.outputs]
    assert "".join(o.text for o in outputs if o.get("name") == "stdout") == plain
    assert "forked" not in json.dumps(outputs)


def test_what_a_forked_worker_would_have_of_the_programs_state(tmp_path):
    """Environment, folder, limits, torch's defaults, settings of modules: as under fork."""
    (tmp_path / "config.py").write_text("SIZE = 1\noptions = {'a': [1]}\n_quiet = None\nlater = 0\n")
    (tmp_path / "sub").mkdir()
    script = tmp_path / "train.py"
    script.write_text(
        scripted(
            """
            import json, locale, logging, resource, socket, warnings
            import numpy, PIL.Image, PIL.ImageFile
            import config
            warmed = list(DataLoader([1], num_workers=1))  # the server is there before all of this
            os.environ["SET_LATE"] = "yes"
            os.environ.pop("HOME", None)
            os.chdir("sub"); os.umask(0o077)
            sys.path.insert(0, "/nowhere")
            resource.setrlimit(resource.RLIMIT_NOFILE, (5000, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
            os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])
            sys.setrecursionlimit(2500); socket.setdefaulttimeout(12.5)
            torch.set_default_dtype(torch.float64)
            torch.set_grad_enabled(False)
            torch.use_deterministic_algorithms(True, warn_only=True)
            torch.multiprocessing.set_sharing_strategy("file_system")
            config.SIZE = 7; config.options["a"].append(2); config._quiet = True; config.later = 3.5
            PIL.ImageFile.LOAD_TRUNCATED_IMAGES = True; PIL.Image.MAX_IMAGE_PIXELS = None
            warnings.filterwarnings("ignore", "some text"); warnings.simplefilter("error", FutureWarning)
            logging.getLogger("mine").setLevel(logging.ERROR); logging.getLogger().setLevel(logging.DEBUG)
            sys.argv.append("added")
            import gc; gc.disable(); gc.set_threshold(500, 5, 7)
            class State(Dataset):
                def __len__(self): return 1
                def __getitem__(self, i):
                    umask = os.umask(0); os.umask(umask)
                    return json.dumps({
                        "environ": dict(os.environ), "cwd": os.getcwd(), "umask": umask, "path": sys.path[0],
                        "files": resource.getrlimit(resource.RLIMIT_NOFILE), "cores": sorted(os.sched_getaffinity(0)),
                        "recursion": sys.getrecursionlimit(), "timeout": socket.getdefaulttimeout(),
                        "dtype": str(torch.get_default_dtype()), "grad": torch.is_grad_enabled(),
                        "deterministic": torch.are_deterministic_algorithms_enabled(),
                        "warn_only": torch.is_deterministic_algorithms_warn_only_enabled(),
                        "sharing": torch.multiprocessing.get_sharing_strategy(), "threads": torch.get_num_threads(),
                        "config": [config.SIZE, config.options, config._quiet, config.later],
                        "pil": [PIL.ImageFile.LOAD_TRUNCATED_IMAGES, PIL.Image.MAX_IMAGE_PIXELS],
                        "warnings": [str(entry[:3]) for entry in warnings.filters[:2]],
                        "log": [logging.getLogger("mine").level, logging.root.level], "argv": sys.argv[1:],
                        "garbage": [gc.isenabled(), gc.get_threshold()],
                        "seeds": [int(torch.initial_seed()) % 1000, get_worker_info().seed % 1000],
                        "random": [__import__("random").random(), float(numpy.random.rand()), float(torch.rand(()))],
                    }, sort_keys=True, default=str)
            torch.manual_seed(5)
            print(next(iter(DataLoader(State(), batch_size=None, num_workers=1))))
            """
        )
    )
    plain = json.loads(python(str(script), cwd=tmp_path).stdout)
    ours = json.loads(rocm_patch(*RUN, "--profile", "none", str(script), cwd=tmp_path).stdout)
    assert plain["environ"].pop("SET_LATE") == ours["environ"].pop("SET_LATE") == "yes"
    assert "HOME" not in ours["environ"]
    ours_only = {name for name in ours["environ"] if name not in plain["environ"]}
    assert all("ROCM_PATCH" in name or name == "PYTHONPATH" for name in ours_only), ours_only
    for state in (plain, ours):
        del state["environ"]
    assert ours == plain


def test_two_generations_of_definitions(tmp_path):
    """A class that is defined anew, as in a notebook's cell that is run again, is the new one in new workers."""
    path = tmp_path / "train.py"
    path.write_text(
        scripted(
            """
            for value in (1, 2):
                class Constant(Dataset):
                    number = value
                    def __len__(self): return 2
                    def __getitem__(self, i): return self.number + Constant.number
                print([int(n) for n in DataLoader(Constant(), num_workers=1)])
                Constant.number = 10
                print([int(n) for n in DataLoader(Constant(), num_workers=1)])
            """
        )
    )
    plain = python(str(path)).stdout
    assert plain.splitlines() == ["[2, 2]", "[20, 20]", "[4, 4]", "[20, 20]"]
    assert rocm_patch(*RUN, str(path)).stdout == plain
