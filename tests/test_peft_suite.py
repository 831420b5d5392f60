"""PEFT's own behaviour tests, of the installed version's sdist, with `TopologyConfig` for the method under test.

None of PEFT's code is kept here: `make setup` fetches the sdist, its tests are imported from `.peft-tests/`, and these
tests are skipped where they are not. `make test` runs one family of models, `make
check-all` (`--whole`) all of them. A test that cannot hold for a mask is expected to fail with the error of its row in
`INAPPLICABLE`; any other error is a defect. `docs/peft.md` shows that table, and this file writes it there:
`python tests/test_peft_suite.py`.
"""

from __future__ import annotations

import ast
import contextlib
import copy
import importlib
import importlib.util
import inspect
import itertools
import re
import shutil
import subprocess
import sys
import traceback
import types
import warnings
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import peft
import pytest
import torch
from peft_helpers import DOCUMENT, FAMILIES, ROUTED, documented
from transformers import AutoModelForCausalLM

from topo_adapter import TopologyConfig, card

REPOSITORY = DOCUMENT.parents[1]
SDIST = REPOSITORY / ".peft-tests" / f"peft-{peft.__version__}" / "tests"
HERE = SDIST.is_dir()

SMALL: dict[str, Any] = {"depth": 4, "visible_depth": 4, "router_dim": 8, "local_window": 1, "num_sink_tokens": 0}
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "fresh": SMALL,
    "in force": {**SMALL, "homotopy": 1.0},
    "tied": {**SMALL, "homotopy": 1.0, "tie_query_key": True},
    "kv_head": {**SMALL, "homotopy": 1.0, "route_per": "kv_head"},
    "masked": {**SMALL, "homotopy": 1.0, "gradient_bridge": "masked", "gumbel_noise": False},
}
QUICK = ("fresh", "in force")  # of one family, what `make test` runs; `--whole` adds the rest
CUSTOM_FAMILIES = ("llama", "gemma3")  # whose attention differs most
CUSTOM_VARIANTS = ("default", "fresh", "in force", "kv_head")


class Row(NamedTuple):
    """A test that cannot apply: regular expressions of `part/test[family-variant]` and of its error, and the reason."""

    test: str
    error: str
    reason: str


#: Only what a user of PEFT would accept on reading why.
INAPPLICABLE = [
    Row(
        r"_test_save_pretrained(_selected_adapters)?-1\[|test_save_pretrained_pickle",
        r"^AdapterFileError: safe_serialization must be True",
        "Pickles run code when they are read: adapters are saved and loaded as safetensors alone.",
    ),
    Row(
        r"\[\w+-(default|fresh)\]",
        r"^MergeError: homotopy must be 1 to merge",
        "A topology that is not in force is refused by name; the variants at homotopy 1 run the test.",
    ),
    Row(
        r"_test_(disable|unload)_adapter\[.*-(default|fresh)\]|_test_(safe_merge|merge_layers_multi)\[.*-(default|fresh)\]"
        r"|test_save_load_roundtrip\[.*-(default|fresh)\]",
        r"^AssertionError.*assert not torch.allclose",
        "It asks for a fresh adapter that changes the output; at homotopy 0 it is the base by design.",
    ),
    Row(
        r"custom/test_disable_adapters\[.*-(default|fresh)\]",
        r"^AssertionError.*assert not torch.allclose\(outputs_before, outputs_after",
        "Homotopy is raised by a callback, not by an optimizer's step.",
    ),
    Row(
        r"custom/test_disable_adapters",
        r"^AssertionError.*assert torch.allclose\(outputs_(base|before), outputs_(before|disabled)",
        "It asks for a start that is the base; the variant starts in force.",
    ),
    Row(
        r"custom/test_only_params_are_updated\[.*-default\]",
        r"^AssertionError.*assert not torch.allclose\(param_before",
        "The test's 12 tokens lie in the default window of 128: no far pair, no gradient; small windows run it.",
    ),
    Row(
        r"custom/test_in_features_out_features_exposed",
        r"^AssertionError.*in_features",
        "The layer is a child of an attention module and has no features in or out.",
    ),
    Row(
        r"_test_from_pretrained_config_construction",
        r"^AssertionError.*is config$",
        "Each adapter has a copy of the configuration: training and the density dial write to it.",
    ),
    Row(
        r"_test_merge_layers_multi",
        r"^MergeError: merging needs exactly one active topology adapter",
        "Two masks are not added up.",
    ),
    Row(
        r"_test_merge_layers_nan",
        r"must be finite, got NaN",
        "It is refused, in other words: nothing is merged into weights.",
    ),
    Row(
        r"_test_safe_merge",
        r"^AssertionError.*assert torch.allclose\(logits_peft, logits_unloaded, atol=atol",
        "It asks for 1e-6 at logits of 5; merged and unmerged attention round differently.",
    ),
    Row(
        r"_test_training_layer_indexing\[gemma",
        r"^TopologyConfigError: layers_to_transform names layers \[0\]",
        "Layer 0 slides and is never routed; that is refused by name.",
    ),
    Row(r"_test_safe_merge\[gemma", r"share memory", "The base's own tied embedding; nothing of the adapter."),
    Row(
        r"config/test_from_json_file\[.*kwargs1\]",
        r"^Failed",
        "`from_json_file` is the raw JSON, whose keys are strings; `from_pretrained` makes integers of them.",
    ),
]


def table() -> str:
    """The rows of docs/peft.md."""
    lines = ["| Test | Its error | Why |", "|---|---|---|"]
    for row in INAPPLICABLE:
        test, error = (f"`{text.replace('|', chr(92) + '|')}`" for text in (row.test, row.error))
        lines.append(f"| {test} | {error} | {row.reason} |")
    return "\n".join(lines)


def test_the_documented_table_is_this_one() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    assert documented(text, "inapplicable", table()) == text, "run `python tests/test_peft_suite.py`"


# ---------------------------------------------------------------- the sdist


@contextlib.contextmanager
def _offline(model_id: str) -> Iterator[None]:
    yield


def _imported(name: str) -> Any:
    """A module of the sdist's tests. What it imports and never uses here may be missing."""
    if "peft_tests" not in sys.modules:
        package = types.ModuleType("peft_tests")
        package.__path__ = [str(SDIST)]
        sys.modules["peft_tests"] = package
        unused = {"diffusers": ["StableDiffusionPipeline", "UNet2DConditionModel"], "parameterized": ["parameterized"]}
        for missing, attributes in unused.items():
            if importlib.util.find_spec(missing) is None:
                module = types.ModuleType(missing)
                for attribute in attributes:
                    setattr(module, attribute, type(attribute, (), {"expand": staticmethod(lambda *_: lambda f: f)}))
                sys.modules[missing] = module
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = importlib.import_module(f"peft_tests.{name}")
    module.hub_online_once = _offline
    return module


class Logits:
    """What PEFT's tests of custom models call a model class: its models return a tensor."""

    @staticmethod
    def from_pretrained(path: str, dtype: torch.dtype = torch.float32) -> Any:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
        inner: Any = type(model)

        def forward(self: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
            out = inner.forward(self, *args, **{"use_cache": False, **kwargs})
            return torch.log_softmax(out.logits[:, -1].float(), -1)

        forward.__signature__ = inspect.signature(inner.forward)  # type: ignore[attr-defined]
        attributes = {"forward": forward, "dtype": property(lambda self: dtype, lambda self, value: None)}
        model.__class__ = type(inner.__name__, (inner,), attributes)
        return model


def _inputs(self: Any) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 61, (2, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}


# ---------------------------------------------------------------- cases

_OTHERS = ("test_training_custom_models", "test_mixed_adapter_batches")  # of shapes of models, and LoRA's
Case = Callable[[str, Path], None]  # of a folder with a model, and an empty one


def _settings(variant: str, **more: Any) -> dict[str, Any]:
    return {**copy.deepcopy(VARIANTS[variant]), **more}


def common_cases(variant: str) -> dict[str, Case]:
    """`PeftCommonTester`: what every method's tests of decoders call."""
    common = _imported("testing_common")
    attributes = {
        "transformers_class": AutoModelForCausalLM,
        "torch_device": "cpu",
        "prepare_inputs_for_testing": _inputs,
    }
    tester = type("Tester", (common.PeftCommonTester,), attributes)
    half = [{"dtype": torch.float16}, {"dtype": torch.bfloat16}]
    safe = [{}, {"safe_serialization": False}]
    extra: dict[str, list[dict[str, Any]]] = {
        "_test_save_pretrained": safe,
        "_test_save_pretrained_selected_adapters": safe,
        "_test_add_adapter_no_autocast_adapter_dtype": half,
        "_test_generate_pos_args": [{"raises_err": False}],
        "_test_training_gradient_checkpointing": [{"use_reentrant": True}, {"use_reentrant": False}],
    }
    cases: dict[str, Case] = {}
    names = [name for name in dir(common.PeftCommonTester) if name.startswith("_test_")]
    for name in names:
        if name.startswith("_test_weighted_combination_of_adapters_"):
            continue  # LoRA's and IA3's
        for number, kwargs in enumerate(extra.get(name, [{}])):

            def case(path: str, folder: Path, name: str = name, kwargs: dict[str, Any] = kwargs) -> None:
                head = ("",) if name == "_test_passing_input_embeds_works" else ()
                config = _settings(variant, task_type="CAUSAL_LM")
                getattr(tester(), name)(*head, path, TopologyConfig, config, **kwargs)

            cases[f"common/{name}{f'-{number}' if number else ''}"] = case
    return cases


def custom_cases(variant: str, whole: bool) -> dict[str, Case]:
    """What PEFT's tests of custom models add to the common ones."""
    custom, low = _imported("test_custom_models"), _imported("test_low_level_api")
    # PEFT asks for a start that changes the output; here the variant says whether it does
    custom.set_init_weights_false = lambda config_cls, kwargs: dict(kwargs)
    attributes = {
        "__test__": False,
        "transformers_class": Logits,
        "torch_device": "cpu",
        "prepare_inputs_for_testing": _inputs,
    }
    tester = type("Custom", (custom.TestPeftCustomModel,), attributes)
    sharded = type("Sharded", (custom.TestPeftFsdpStateDict,), attributes)
    needed = {"test_name", "model_id", "config_cls", "config_kwargs"}
    cases: dict[str, Case] = {}
    for name, function in vars(custom.TestPeftCustomModel).items():
        if not name.startswith("test_") or not needed <= set(inspect.signature(function).parameters):
            continue
        only_calls = f"self._{name}(" in inspect.getsource(function)  # the common test
        if (
            only_calls
            or "_parametrized" in name
            or name in ("test_training_custom_models", "test_mixed_adapter_batches")
        ):
            continue
        ways: list[dict[str, Any]] = [{}]
        if name == "test_adapter_dtype_autocast":
            dtypes = (torch.float16, torch.bfloat16, torch.float32) if whole else (torch.bfloat16,)
            ways = [
                {"dtype": dtype, "autocast_adapter_dtype": autocast, "low_cpu_mem_usage": low_memory}
                for dtype, autocast, low_memory in itertools.product(dtypes, (True, False), (True, False))
            ]
        for number, kwargs in enumerate(ways):

            def case(
                path: str, folder: Path, name: str = name, function: Any = function, kwargs: dict[str, Any] = kwargs
            ) -> None:
                more = {"tmp_path": folder} if "tmp_path" in inspect.signature(function).parameters else {}
                config = {"config_cls": TopologyConfig, "config_kwargs": _settings(variant)}
                getattr(tester(), name)(test_name="", model_id=path, **config, **kwargs, **more)

            cases[f"custom/{name}{f'-{number}' if number else ''}"] = case

    def roundtrip(path: str, folder: Path) -> None:
        import torch.distributed as dist

        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        try:
            sharded().test_save_load_roundtrip_fsdp_wrapped("", path, TopologyConfig, _settings(variant))
        finally:
            dist.destroy_process_group()

    cases["custom/test_save_load_roundtrip_fsdp_wrapped"] = roundtrip

    # tests that make a DeepMLP: the same on two layers of a decoder
    for name in (
        "test_loading_model_requires_grad_set_correctly",
        "test_loading_model_with_modules_to_save_requires_grad_set_correctly",
    ):
        for trainable in (False, True):

            def requires_grad(path: str, folder: Path, name: str = name, trainable: bool = trainable) -> None:
                layers = ROUTED[Path(path).name]

                def config(target_modules: Any = None, modules_to_save: Any = None, **kwargs: Any) -> TopologyConfig:
                    named = sorted({int(target.split(".")[1]) for target in target_modules or []})
                    kwargs |= {} if modules_to_save is None else {"modules_to_save": ["lm_head"]}
                    return TopologyConfig(
                        **_settings(variant), layers_to_transform=[layers[min(n, 1)] for n in named], **kwargs
                    )

                custom.DeepMLP = lambda size: AutoModelForCausalLM.from_pretrained(path)
                getattr(custom.TestRequiresGrad(), name)(config, trainable, folder)

            cases[f"custom/{name}-{trainable}"] = requires_grad

    def inject(path: str, folder: Path) -> None:
        recorded = types.SimpleNamespace(list=[], clear=lambda: None)
        low.TestInjectAdapterFromStateDict().test_inject_from_state_dict_and_from_config_target_same_layers(
            (AutoModelForCausalLM, path), TopologyConfig(**_settings(variant)), recorded
        )

    cases["low_level/test_inject_from_state_dict_and_from_config_target_same_layers"] = inject
    return cases


def cases(whole: bool) -> dict[tuple[str, str], Case]:
    """(family, name of the test) -> how it is run."""
    found: dict[tuple[str, str], Case] = {}
    for family, variant in itertools.product([*FAMILIES] if whole else ["llama"], VARIANTS):
        if family == "qwen3" or (variant == "masked" and family != "llama"):
            continue  # nothing new
        if not whole and variant not in QUICK:
            continue
        of_pair = common_cases(variant)
        if variant in (CUSTOM_VARIANTS if whole else ["in force"]) and family in CUSTOM_FAMILIES:
            of_pair |= custom_cases(variant, whole)
        found |= {(family, f"{name}[{family}-{variant}]"): case for name, case in of_pair.items()}
    return found


# ---------------------------------------------------------------- running

_used: set[Row] = set()


def inapplicable(name: str, error: str) -> Row | None:
    return next((row for row in INAPPLICABLE if re.search(row.test, name) and re.search(row.error, error, re.S)), None)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if metafunc.config.getoption("whole") and not HERE:
        raise pytest.UsageError(
            f"--whole needs PEFT's tests in {SDIST}; make setup fetches them into a new environment"
        )
    if "case" not in metafunc.fixturenames or not HERE:
        return
    found = cases(metafunc.config.getoption("whole"))
    arguments = [(*key, case) for key, case in found.items()]
    metafunc.parametrize(("family", "name", "case"), arguments, ids=[name for _, name in found])


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """The folder of a family's tiny model, by name."""
    root = tmp_path_factory.mktemp("peft")

    def path(family: str) -> str:
        folder = root / family
        if not folder.exists():
            torch.manual_seed(0)
            kwargs = {"initializer_range": 0.3} | ({} if ROUTED[family] == [1, 3] else {"num_hidden_layers": 2})
            AutoModelForCausalLM.from_config(FAMILIES[family](**kwargs)).save_pretrained(folder)
        return str(folder)

    return path


needs_sdist = pytest.mark.skipif(not HERE, reason=f"needs PEFT's tests in {SDIST}: make setup puts them there")


@needs_sdist
@pytest.mark.filterwarnings("ignore")
def test_as_peft_does(
    family: str, name: str, case: Case, models: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(
        card, "hub_id", lambda name: name
    )  # the folders stand for hub ids, which a card names, as it does no folder
    try:
        case(models(family), tmp_path)
    except (Exception, pytest.fail.Exception) as exception:
        where = traceback.extract_tb(exception.__traceback__)
        line = next((frame.line for frame in reversed(where) if str(SDIST) in frame.filename), "")
        if (row := inapplicable(name, f"{type(exception).__name__}: {exception}  {line}")) is None:
            raise
        _used.add(row)
        pytest.xfail(row.reason)


@needs_sdist
def test_configurations_as_peft_does(tmp_path: Path, pytestconfig: pytest.Config) -> None:
    """test_config.py with `TopologyConfig` for the only class, in a process of its own."""
    if not pytestconfig.getoption("whole"):
        pytest.skip("with --whole")
    source = (SDIST / "test_config.py").read_text(encoding="utf-8")
    lines = source.splitlines()
    assignments = [node for node in ast.parse(source).body if isinstance(node, ast.Assign)]
    classes = next(node for node in assignments if getattr(node.targets[0], "id", "") == "ALL_CONFIG_CLASSES")
    lines[classes.lineno - 1 : classes.end_lineno] = [
        "from topo_adapter import TopologyConfig",
        "FILLED = {'homotopy': 1.0, 'visible_depth': {0: [1, 2, 3, 4]}}",
        "ALL_CONFIG_CLASSES = ((TopologyConfig, {}), (TopologyConfig, FILLED))",
    ]
    few = re.compile(r'"config_class",\s*\[LoHaConfig.*?\]', re.S)
    text = few.sub('"config_class", [TopologyConfig]', "\n".join(lines))
    (tmp_path / "test_topology_config.py").write_text(text, encoding="utf-8")
    shutil.copy(SDIST / "testing_utils.py", tmp_path)
    (tmp_path / "__init__.py").touch()
    # the hub's, and other methods'
    others = "cache_dir or nested or test_from_peft_type or runtime_config or lora or ia3 or prompt_encoder"
    report = tmp_path / "report.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}"]
    command += ["-k", f"not ({others})", "test_topology_config.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert report.exists(), done.stdout[-2000:] + done.stderr[-2000:]
    problems, passed = [], 0
    for case in ElementTree.parse(report).iter("testcase"):
        name = f"config/{case.attrib['name']}"
        failed = [child.attrib.get("message", "") for child in case if child.tag in ("failure", "error")]
        if not failed:
            passed += not any(child.tag == "skipped" for child in case)
        elif name.startswith("config/test_from_pretrained["):
            continue  # asks the hub
        elif (row := inapplicable(name, f"Failed: {failed[0]}")) is not None:
            _used.add(row)
        else:
            problems.append(f"{name}: {failed[0][:600]}")
    assert passed and not problems, "\n".join(problems)


@needs_sdist
def test_every_row_is_needed(pytestconfig: pytest.Config) -> None:
    """The last test: with `--whole`, each row of the table has excused some test."""
    if not pytestconfig.getoption("whole"):
        pytest.skip("with --whole")
    assert _used == set(INAPPLICABLE), [row for row in INAPPLICABLE if row not in _used]


if __name__ == "__main__":
    DOCUMENT.write_text(documented(DOCUMENT.read_text(encoding="utf-8"), "inapplicable", table()), encoding="utf-8")
