"""support/guides.py: guides in files, which one is taken, and guides in other tools."""

# ruff: noqa: F811 (the fixtures' names)

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from conftest import disagreement, noise, randomised
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DDIMScheduler,
    PNDMScheduler,
    StableDiffusionControlNetPipeline,
)
from PIL import Image
from references import with_our_weights
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small import ALL, FULL, KINDS, SEEING, SMALL, STUDENTS, guided, trained
from toys import DEEP, UNET, here, refusal, toys, write_guide  # noqa: F401 (fixtures)

import ppdd
import sample
from ppdd import GuideConfig
from support import fast, guides
from support.base import MINI, Base, load_base
from support.checkpoint import CheckpointError
from support.cli import BadInput
from support.guides import (
    BUNDLED,
    STAGE_ONE_STEPS,
    describe_guide,
    diffusers_residuals,
    find_guide,
    guide_path,
    load_guide,
    read_guide,
    save_controlnet,
    save_guide,
)
from unet import KEY_PREFIX, UNet, UNetConfig

# ------------------------------------------------------------------------------- files


@pytest.mark.parametrize("config", [*ALL, *STUDENTS], ids=str)
def test_a_guide_comes_back_from_its_file(tmp_path, config):
    guide, about = trained(config), {"base": "mini", "stage": "cfg", "g_range": [2, 9]}
    save_guide(tmp_path / "new" / "guide.safetensors", guide, config, about)
    file, = (tmp_path / "new").iterdir()
    assert read_guide(file) == (config, about, SMALL)
    back = load_guide(file, SMALL)
    assert type(back) is type(guide) and not back.training and back.guide_config == config
    assert not any(p.requires_grad for p in back.parameters())
    assert {v.dtype for v in load_file(file).values()} == {torch.float16}
    for name, value in guide.state_dict().items():
        assert torch.equal(back.state_dict()[name], value.half().float())
    rough = load_guide(file, SMALL, torch.bfloat16)
    assert {p.dtype for p in rough.parameters()} == {torch.bfloat16}


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as opened:
        return opened.metadata()


@pytest.mark.parametrize("config", [*KINDS, *STUDENTS], ids=str)
def test_a_guide_for_another_base_is_refused_with_both_shapes(tmp_path, config):
    path = tmp_path / "guide.safetensors"
    save_guide(path, trained(config), config, {})
    other = replace(SMALL, context_dim=48, num_heads=8)
    with pytest.raises(CheckpointError, match=r"guide.safetensors was trained for a base of another"
                       r" size \(num_heads 4 and not 8, context_dim 24 and not 48\): use it"):
        load_guide(path, other)
    metadata = metadata_of(path)
    del metadata["unet_config"]                                             # as older files are
    save_file(load_file(path), path, metadata)
    assert read_guide(path).base_config is None
    assert load_guide(path, SMALL).guide_config.kind == config.kind
    with pytest.raises(CheckpointError, match="another size: use it"):
        load_guide(path, other)


def test_a_student_is_a_unet_of_an_official_file_and_what_embeds_g(tmp_path):
    path = tmp_path / "whole.safetensors"
    save_guide(path, trained(STUDENTS[1]), STUDENTS[1], {})
    with torch.device("meta"):
        names = {KEY_PREFIX + name for name in UNet(SMALL).state_dict()}
    extra = {f"{KEY_PREFIX}g_embed.{i}.{part}" for i in (0, 2) for part in ("weight", "bias")}
    assert {*load_file(path)} == names | extra
    assert guides.fits(path, SMALL) and not guides.fits(path, UNET)
    metadata = metadata_of(path) | {"guide": '{"kind": "whole", "prediction": "x"}'}
    save_file(load_file(path), path, metadata)
    with pytest.raises(CheckpointError, match="make no network .prediction is 'x': use eps or v"):
        load_guide(path, SMALL)


@pytest.mark.parametrize("pool, read", [("attention", True), ("mean", False), ("end", False)])
def test_older_files_name_the_way_they_pool(tmp_path, pool, read):
    path = tmp_path / "guide.safetensors"
    save_guide(path, trained(GuideConfig()), GuideConfig(), {})
    metadata = metadata_of(path)
    metadata["guide"] = json.dumps(json.loads(metadata["guide"]) | {"pool": pool})
    save_file(load_file(path), path, metadata)
    if read:
        assert read_guide(path).config == GuideConfig() and load_guide(path, SMALL)
    else:
        with pytest.raises(CheckpointError, match=f"option that is gone, --pool {pool}: train it"):
            read_guide(path)


def test_a_guide_of_stage_one_counts_as_one_for_64_steps(tmp_path):
    for steps, counted in ((0, 64), (16, 16)):
        path = write_guide(tmp_path / "guide.safetensors", UNET, "tiny", steps)
        assert read_guide(path).steps == counted
    assert STAGE_ONE_STEPS == 64


def test_every_bundled_guide_is_read(mini):
    files = sorted(BUNDLED.glob("*.safetensors"))
    assert len(files) > 3
    for path in files:
        file = read_guide(path)
        assert file.base_config in (None, mini.unet.config)
        assert load_guide(path, mini.unet.config).guide_config == file.config


def test_what_is_no_guide_is_refused(tmp_path):
    bad = tmp_path / "bad.safetensors"
    tensors = {"x": torch.zeros(1)}
    for write, sentence in (
            (lambda: bad.write_text("version https://git-lfs.github.com/spec/v1\n"), "a Git LFS"),
            (lambda: bad.write_bytes(b"PK\3\4"), "pickle"), (lambda: bad.write_bytes(b""), "empty"),
            (lambda: save_file(tensors, bad), "not a guide"),
            (lambda: save_file(tensors, bad, {"guide": "{", "about": "{}"}), "not a guide"),
            (lambda: save_file(tensors, bad, {"guide": '{"size": 3}', "about": "{}"}),
             "not a guide")):
        write()
        for read in (read_guide, lambda path: load_guide(path, SMALL)):
            with pytest.raises(CheckpointError, match=f"bad.safetensors is .*{sentence}"):
                read(bad)
    with pytest.raises(CheckpointError, match="is not a file"):
        load_guide(tmp_path, SMALL)
    with pytest.raises(CheckpointError, match="none.safetensors does not exist"):
        load_guide(tmp_path / "none.safetensors", SMALL)


# ------------------------------------------------------------------------------- finding one


def base_of(config: UNetConfig, name: str = "toy") -> Base:
    """As much of a base as finding a guide asks for."""
    with torch.device("meta"):
        unet = ppdd.UNet(config)
    return Base(unet, None, None, None, Path(f"{name}.safetensors"))


def test_the_guide_taken_is_of_the_kind_the_shape_and_about_the_steps(here):
    base = base_of(UNET)
    Path("toy.safetensors").touch()
    for kind in ("tiny", "full"):
        for steps, suffix in ((1, "-8"), (11, "-8"), (12, "-16"), (45, "-32"), (46, ""), (999, "")):
            assert find_guide(base, kind, steps) == Path(f"guides/toy/{kind}{suffix}.safetensors")
    assert find_guide(base_of(DEEP, "deep"), "tiny", 8) is None
    student = write_guide(Path("mine/whole-8.safetensors"), UNET, "whole", 8)
    assert find_guide(base, "whole", 8, "mine") == student and not find_guide(base, "whole", 8)


def test_the_folder_given_comes_before_the_base_s_own_and_that_before_others(here):
    Path("toy.safetensors").touch()
    Path("guides").unlink()
    base = base_of(UNET)
    for path, steps, about in (
            (guides.BUNDLED / "tiny.safetensors", 8, {"base": "other"}),
            ("guides/other/tiny.safetensors", 8, {}),               # of this base: before the steps
            ("guides/toy/gated.safetensors", 64, {"form": "gated"}),
            ("guides/toy/sum.safetensors", 0, {}),                  # the paper's form
            ("given/deep/er.safetensors", 64, {"base": "other"})):
        write_guide(Path(path), UNET, "tiny", steps, **about)
        assert find_guide(base, "tiny", 8, "given") == Path(path)
        assert find_guide(base, "full", 8, "given") is None
    assert find_guide(base, "tiny", 8) == Path("guides/toy/sum.safetensors")
    write_guide(Path("given/tiny-seeing-8.safetensors"), UNET, "tiny", 8, form="seeing")
    assert find_guide(base, "seeing", 8, "given") == Path("given/tiny-seeing-8.safetensors")
    assert find_guide(base, "tiny", 8, "given") == Path("given/deep/er.safetensors")


def test_a_student_to_be_moved_is_one_of_the_base_that_it_is_moved_from(here):
    base = base_of(UNET)
    Path("toy.safetensors").touch()
    for name in ("a", "plain", "toy"):
        write_guide(Path(f"guides/{name}/whole-8.safetensors"), UNET, "whole", 8, base=name)
    for home in ("toy", "plain"):
        found = find_guide(base, "whole", 8, home=home)
        assert found == Path(f"guides/{home}/whole-8.safetensors")
    assert find_guide(base, "whole", 8) == Path("guides/toy/whole-8.safetensors")
    known = {"base": "plain", "base_hash": "1"}
    assert not guides.doubts_of_origin(found, known, Path("plain.safetensors"), "1")
    doubt, = guides.doubts_of_origin(found, known, Path("a.safetensors"), "2")
    assert "distilled on plain, whose hash is not that of a.safetensors" in doubt


def test_guides_for_a_single_g_and_other_files_are_passed_over(here):
    Path("toy.safetensors").touch(), Path("mine").mkdir()
    Path("mine/a.safetensors").write_bytes(b"<html>")
    save_file({"x": torch.zeros(1)}, "mine/b.safetensors")
    write_guide(Path("mine/c.safetensors"), DEEP, "tiny", 8)
    write_guide(Path("mine/d.safetensors"), UNET, "tiny", 8, g_range=(5, 5))
    found = find_guide(base_of(UNET), "tiny", 8, "mine")
    assert found == Path("guides/toy/tiny-8.safetensors")


def test_trials_in_guides_are_passed_over(here):
    Path("toy.safetensors").touch()
    Path("guides").unlink()
    trial, base = {"settings": {"max_updates": 50}}, base_of(UNET)
    bundled = write_guide(guides.BUNDLED / "tiny.safetensors", UNET, "tiny", 64)
    for folder in ("guides/toy", "guides/other", "given"):
        write_guide(Path(folder) / "tiny-8.safetensors", UNET, "tiny", 8, **trial)
    assert find_guide(base, "tiny", 8) == bundled
    assert find_guide(base, "tiny", 8, "given") == Path("given/tiny-8.safetensors")
    with pytest.raises(BadInput, match="no guides/toy/tiny-8.safetensors, but for a trial, which"):
        guide_path(base, "tiny-8")
    own = write_guide(Path("guides/toy/tiny.safetensors"), UNET, "tiny", 0,
                      settings={"max_updates": 0})
    assert find_guide(base, "tiny", 8) == own == guide_path(base, "tiny")


def test_a_guide_is_found_by_its_name(here, mini):
    Path("toy.safetensors").touch()
    base = base_of(UNET)
    assert guide_path(base, "tiny-8") == Path("guides/toy/tiny-8.safetensors")
    assert guide_path(base, "~/x.safetensors") == Path.home() / "x.safetensors"
    with pytest.raises(BadInput, match="there is no guides/toy/none.safetensors: train.py"):
        guide_path(base, "none")


def test_a_line_says_which_guide_is_used():
    base = Base(None, None, None, None, Path("styled.safetensors"))
    path = Path("a/tiny-8.safetensors")
    line = describe_guide(path, {"base": "toy", "steps": 8, "uncond": "dull"}, base)
    assert line == (f"guide: {path}, distilled on toy for 8 steps, plugged into styled.safetensors "
                    "as it is, away from 'dull'")
    line = describe_guide(path, {"base": "toy", "steps": 8, "settings": {"guide": "whole"}}, base)
    assert line.endswith("for 8 steps, a UNet of its own: that of styled.safetensors is not used")
    start = f"guide: {path}, distilled on styled.safetensors for"
    first, settings = {"base": base.name, "updates": 6000}, {"updates": 50, "max_updates": 50}
    for about, rest in (
            ({"base": base.name}, "any steps"), (first, "any steps, after 6,000 updates"),
            (first | {"updates": 50, "stage": 3, "steps": 8, "settings": settings},
             "8 steps, after 50 + 3 × 50 updates, a trial of at most 50 a stage"),
            (first | {"stage": 2, "steps": 2, "init": {"updates": 500, "steps": 8}},
             "2 steps, after 2 × 6,000 updates")):
        assert describe_guide(path, about, base) == f"{start} {rest}"


def test_a_guide_file_is_described_on_the_command_line(here, toys, capsys):
    sample.main(["--about", "guides/toy/full-8.safetensors"])
    printed = capsys.readouterr().out
    about = json.loads(printed)
    assert about["base"] == "toy" and about["guide"]["kind"] == "full" and about["steps"] == 8
    assert about["base_shape"] == json.loads(json.dumps(asdict(UNET)))
    assert printed == json.dumps(about, indent=1, sort_keys=True) + "\n"
    assert not Path("out").exists()
    assert "is not a guide" in refusal(capsys, "--about", f"{toys}/toy.safetensors")
    assert "does not exist" in refusal(capsys, "--about", "nowhere.safetensors")


# ------------------------------------------------------------------------------- in other tools

TRAILING = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
            "timestep_spacing": "trailing", "set_alpha_to_one": True, "clip_sample": False}
PROMPTS = ["a big red boat on the sea at sunset", "a tiny yellow tree in the snow"]


@pytest.fixture(scope="module")
def mini():
    return load_base(MINI)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A folder with the miniature's full guide as a ControlNet."""
    folder = tmp_path_factory.mktemp("exported")
    sample.main(["--guide", "full", "--weights", "mini", "--export", str(folder)])
    return folder


def ours_of(mini, name: str, g: float, steps: int = 8):
    guide = load_guide(BUNDLED / f"{name}.safetensors", mini.unet.config)
    z, c = ppdd.noise([3, 4], (4, 8, 8)), mini.embed(PROMPTS)
    return fast.sample(mini.unet, z, c, g, steps, guide), z, c, guide


@pytest.mark.parametrize("size, aware", [("mini", 2), ("sd15", 12)])
def test_so_many_residuals_can_know_the_prompt_as_the_readme_says(mini, size, aware):
    config = mini.unet.config if size == "mini" else UNetConfig(
        model_channels=32, context_dim=64, norm_groups=8)
    guide, g, t = ppdd.build_guide(config, GuideConfig(kind="full")), 8.0, torch.tensor([500])
    for p in guide.parameters():
        torch.nn.init.normal_(p, std=0.1)
    z = ppdd.noise([3], (4, 16, 16))
    residuals = [guide(torch.tensor([g]), None, c[None], z, t)
                 for c in mini.embed(PROMPTS)]
    assert sum(not torch.equal(a, b) for a, b in zip(*residuals)) == aware


@pytest.mark.parametrize("g", [8.0, 3.3])
@pytest.mark.parametrize("single", [False, True], ids=["folder", "single"])
def test_an_exported_guide_is_a_controlnet(mini, exported, tmp_path, g, single):
    """diffusers' pipeline with guidance off and a plain grey image gives our latents."""
    expected, z, c, _ = ours_of(mini, "full-8", g)
    if single:
        shutil.copy(exported / "config.json", tmp_path)
        control = ControlNetModel.from_single_file(
            exported / "full-8-controlnet.safetensors", config=str(tmp_path), local_files_only=True)
    else:
        control = ControlNetModel.from_pretrained(exported, torch_dtype=torch.float32)
    vae = AutoencoderKL(block_out_channels=[4] * 4, norm_num_groups=4, layers_per_block=1,
                        down_block_types=["DownEncoderBlock2D"] * 4,      # only its 8 is asked for
                        up_block_types=["UpDecoderBlock2D"] * 4)
    pipe = StableDiffusionControlNetPipeline(
        vae, None, None, with_our_weights(mini.unet), control, DDIMScheduler(**TRAILING), None,
        None, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    theirs = pipe(prompt_embeds=c, image=torch.full((1, 3, 64, 64), g / 10), guidance_scale=1.0,
                  num_inference_steps=8, latents=z, height=64, width=64, output_type="latent")
    assert disagreement(theirs.images, expected) < 1e-4
    if g == 8.0:
        grey = Image.new("RGB", (64, 64), (204, 204, 204))
        theirs = pipe(prompt_embeds=c, image=grey, guidance_scale=1.0, latents=z, height=64,
                      width=64, num_inference_steps=8, output_type="latent")
        assert disagreement(theirs.images, expected) < 1e-4


def test_an_exported_guide_has_the_names_that_other_tools_look_for(exported):
    """At SD 1.5's size they are those of the ControlNet that everyone has."""
    single = load_file(exported / "full-8-controlnet.safetensors")
    assert {v.dtype for v in single.values()} == {torch.float16}
    assert all(name.startswith("control_model.") for name in single)
    assert "control_model.zero_convs.0.0.weight" in single
    assert "control_model.input_hint_block.14.bias" in single
    with torch.device("meta"):
        guide, theirs = ppdd.FullGuide(UNetConfig()), ControlNetModel(cross_attention_dim=768)
        config = guides._controlnet_config(guide)
        same = ControlNetModel.from_config(config)
    shapes = [{k: v.shape for k, v in model.state_dict().items()} for model in (theirs, same)]
    assert shapes[0] == shapes[1]
    assert theirs.config.attention_head_dim == config["attention_head_dim"]


def test_an_export_is_rounded_once(exported, monkeypatch):
    monkeypatch.setattr(sample, "auto_dtype", lambda device: "bf16")
    sample.main(["--guide", "full", "--weights", "mini", "--export", str(exported / "again")])
    guide = load_file(BUNDLED / "full-8.safetensors")
    for folder in (exported, exported / "again"):
        single = load_file(folder / "full-8-controlnet.safetensors")
        assert all(torch.equal(single[f"control_model.{k}"], v) for k, v in guide.items())


def test_only_a_full_guide_is_exported(here, capsys):
    message = refusal(capsys, "--guide", "tiny", "--export", "there")
    assert "not a full guide" in message and not list(Path("there").iterdir())
    assert not Path("out").exists()


@pytest.mark.parametrize("name, steps", [
    ("tiny-8", 8), pytest.param("tiny", 50, marks=pytest.mark.full)])
def test_a_tiny_guide_in_diffusers_own_loop(mini, name, steps):
    """With the scheduler that the README makes of what SD 1.5 comes with."""
    expected, z, c, guide = ours_of(mini, name, 6.0, steps)
    shipped = PNDMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                            skip_prk_steps=True, set_alpha_to_one=False, steps_offset=1)
    scheduler = DDIMScheduler.from_config(shipped.config, timestep_spacing="trailing",
                                          set_alpha_to_one=True, clip_sample=False)
    unet = with_our_weights(mini.unet)
    scheduler.set_timesteps(steps)
    with torch.no_grad():
        for t in scheduler.timesteps:
            extra = diffusers_residuals(guide, unet, 6.0, t, c)
            eps = unet(z, t, encoder_hidden_states=c, **extra).sample
            z = scheduler.step(eps, t, z).prev_sample
    assert disagreement(z, expected) < 1e-4


@torch.no_grad()
def test_a_seeing_guide_in_diffusers_unet():
    """It reads the features of a half pass, caught by hooks that are gone afterwards."""
    unet = randomised(lambda: UNet(SMALL))
    theirs, guide = with_our_weights(unet), trained(SEEING)
    z, c = noise(2, 4, 8, 8), noise(2, 77, 24, seed=2)
    for t in torch.tensor([999, 20]):
        extra = diffusers_residuals(guide, theirs, 6.0, t, c, z)
        eps = theirs(z, t, encoder_hidden_states=c, **extra).sample
        expected = guided(unet, guide, z, t.expand(2), c, torch.full((2,), 6.0))
        assert disagreement(eps, expected) < 1e-4
        assert disagreement(theirs(z, t, encoder_hidden_states=c).sample, expected) > 1e-2
    assert not any(module._forward_hooks for module in theirs.modules())


def test_a_guide_of_another_hint_width_is_exported_too(tmp_path):
    guide = trained(FULL)
    single = save_controlnet(tmp_path, guide, "mine")
    assert single == tmp_path / "mine-controlnet.safetensors"
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["conditioning_embedding_out_channels"] == [8, 16, 48, 128]
    theirs = ControlNetModel.from_pretrained(tmp_path)
    assert sum(p.numel() for p in theirs.parameters()) == sum(
        p.numel() for p in guide.parameters())
