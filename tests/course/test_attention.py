"""Attention against transformers' own and a block's arithmetic by hand; rollout and masks by their properties."""

import pytest
import torch
from timm.models.vision_transformer import ParallelScalingBlock, ParallelThingsBlock, VisionTransformer
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

from vitdemo import Model, Preprocessing, VitdemoError, convert, load_model, reference_crop
from vitdemo.course import attention_maps, look_at, mask_patches, most_looked_at, rollout
from vitdemo.course.attention import class_attention
from vitdemo.engines.graph import Normalised

SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
    "num_labels": 5,
}
BLOCKS, HEADS, TOKENS, GRID = 6, 4, 197, (14, 14)  # of vit_shapes20


@pytest.fixture(scope="module")
def pixels(shapes20, vit_shapes20):
    return torch.stack([reference_crop(shapes20[i].image, vit_shapes20.info.preprocessing) for i in range(3)])


@pytest.fixture(scope="module")
def maps(vit_shapes20, pixels):
    return attention_maps(vit_shapes20, pixels)


@pytest.fixture(scope="module")
def resnet():
    return load_model("resnet18", weights="random")


def test_is_transformers_attention_with_the_same_weights(tmp_path):
    torch.manual_seed(0)
    theirs = ViTForImageClassification(ViTConfig(**SMALL, attn_implementation="eager")).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.3)  # attention is far from even, and no score so large that it rounds
    theirs.save_pretrained(tmp_path)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    ours = load_model(tmp_path)
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        normalised = Normalised(torch.nn.Identity(), ours.info.preprocessing)(pixels)
        expected = torch.stack(theirs(normalised, output_attentions=True).attentions, dim=1)
    found = attention_maps(ours, pixels)
    assert found.shape == (2, 3, 4, 17, 17)
    assert expected.std() > 0.01, "nothing would tell one attention from another"
    assert (found - expected).abs().max() < 1e-5


def test_leaves_the_model_as_it_is(vit_shapes20, eager, pixels):
    before = eager(pixels)
    attention_maps(vit_shapes20, pixels)
    assert all(block.attn.fused_attn for block in vit_shapes20.module.blocks)
    assert not any(module._forward_hooks for module in vit_shapes20.module.modules())
    assert torch.equal(eager(pixels), before)


def test_rollout_is_the_product_of_the_blocks(vit_shapes20, maps):
    found = rollout(vit_shapes20, maps)
    mixed = 0.5 * (maps.mean(dim=2).double() + torch.eye(TOKENS))
    product = torch.linalg.multi_dot([mixed[0, k] for k in reversed(range(BLOCKS))])
    expected = product[0, 1:] / product[0, 1:].sum()
    assert found.shape == (3, *GRID)
    assert (found[0].flatten() - expected).abs().max() < 1e-6
    assert (found.sum(dim=(1, 2)) - 1).abs().max() < 1e-5


def test_rollout_of_known_attentions(vit_shapes20):
    shape = 1, BLOCKS, HEADS, TOKENS, TOKENS
    uniform = torch.full(shape, 1 / TOKENS)
    assert (rollout(vit_shapes20, uniform) - 1 / 196).abs().max() < 1e-6
    identity = torch.eye(TOKENS).expand(shape)
    assert (rollout(vit_shapes20, identity) == 0).all(), "no patch reaches the class token"
    one = torch.zeros(shape)
    one[..., 1 + 5 * 14 + 3] = 1.0  # every token looks at the patch in row 5, column 3
    flow = rollout(vit_shapes20, one)[0]
    assert flow[5, 3] == 1 and flow.sum() == 1
    assert most_looked_at(flow)[0] == (5, 3)


def test_class_attention_is_the_class_tokens_row(vit_shapes20, maps):
    found = class_attention(vit_shapes20, maps)
    assert found.shape == (3, BLOCKS, *GRID)
    row = maps[1, 4].mean(dim=0)[0, 1:]
    assert (found[1, 4].flatten() - row / row.sum()).abs().max() < 1e-6


def test_most_looked_at_lists_every_patch_once(vit_shapes20, maps):
    flow = rollout(vit_shapes20, maps)[0]
    order = most_looked_at(flow)
    assert len(set(order)) == 196
    assert [flow[place] for place in order] == sorted(flow.flatten(), reverse=True)


def test_a_mask_changes_its_patches_and_nothing_else(vit_shapes20, pixels):
    before = pixels.clone()
    masked = mask_patches(vit_shapes20, pixels, [(0, 13), (5, 2)])
    changed = torch.zeros(224, 224, dtype=torch.bool)
    changed[0:16, 208:224] = changed[80:96, 32:48] = True
    assert (masked[..., changed] == 128).all()
    assert torch.equal(masked[..., ~changed], before[..., ~changed])
    assert torch.equal(pixels, before)


def test_patches_of_a_hybrid_are_those_of_its_grid():
    hybrid = load_model("vit_tiny_r_s16_p8_224", weights="random")  # its patches are of features, 32 pixels each
    masked = mask_patches(hybrid, torch.zeros(3, 224, 224, dtype=torch.uint8), [(0, 0), (6, 6)])
    assert (masked == 128).sum() == 2 * 3 * 32 * 32 and (masked[:, -32:, -32:] == 128).all()


def test_what_the_head_does_not_read_and_blocks_that_do_two_things_at_once_show_no_attention():
    preprocessing = Preprocessing((3, 32, 32), 0.9, "center", "bicubic", (0.5,) * 3, (0.5,) * 3)
    sizes = dict(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2)
    blocks = [dict(block_fn=block) for block in (ParallelThingsBlock, ParallelScalingBlock)]
    for option in (*blocks, dict(global_pool="avg", class_token=True)):
        module = VisionTransformer(**sizes, **option).eval()
        model = Model.from_module(module, preprocessing, name="parallel")
        pixels = torch.zeros(3, 32, 32, dtype=torch.uint8)
        assert look_at(convert(model), model, pixels).rollout is None
        with pytest.raises(VitdemoError, match="parallel: is no VisionTransformer"):
            attention_maps(model, pixels[None])


@pytest.mark.parametrize("place", [(14, 0), (0, -1)])
def test_a_place_that_is_no_patch(vit_shapes20, pixels, place):
    with pytest.raises(VitdemoError, match=r"patch .*14 x 14"):
        mask_patches(vit_shapes20, pixels, [place])


@pytest.mark.parametrize(
    "call",
    [
        lambda model: attention_maps(model, torch.zeros(1, 3, 224, 224, dtype=torch.uint8)),
        lambda model: mask_patches(model, torch.zeros(3, 224, 224, dtype=torch.uint8), []),
        lambda model: rollout(model, torch.zeros(1, 1, 1, 2, 2)),
    ],
)
def test_what_is_no_vit_is_refused_in_one_line(resnet, call):
    with pytest.raises(VitdemoError, match="resnet18: is no VisionTransformer") as error:
        call(resnet)
    assert "\n" not in str(error.value)
