"""What a plan takes of a video: never more than the budget, and as much as the preference allows."""

import math

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers.models.qwen2_vl.video_processing_qwen2_vl import smart_resize

from videonsa.video_planner import VideoPlan, frame_sizes, plan_video

HOUR = {"duration": 3600.0, "width": 1920, "height": 1080}

sides = st.integers(28, 4096)
durations = st.floats(0.04, 50_000)
budgets = st.integers(1, 300_000)
preferences = st.sampled_from(["pixels", "frames", "balanced"])


def plan_or_none(*args, **kwargs) -> VideoPlan | None:
    try:
        return plan_video(*args, **kwargs)
    except ValueError as error:
        assert "leaves" in str(error) and "are" in str(error)
        return None


def possible(duration, width, height, budget, fps, total=None) -> list[tuple[int, int]]:
    """(temporal patches, tokens of each) of all plans at up to `fps`, by trying every size and number."""
    frames = max(int((duration + 2e-3) * fps), 2)
    frames = min(frames, total or frames)
    patches = math.ceil((frames // 2 * 2 or frames) / 2)
    tokens = set()
    for k in range(1, 65):
        h, w = smart_resize(height, width, 28, 28 * 28, k * 28 * 28)
        tokens.add(h * w // 784)
    return [(n, t) for t in tokens for n in range(1, patches + 1) if n * t <= budget]


class TestTheBudget:
    @settings(max_examples=300, deadline=None)
    @given(
        durations,
        sides,
        sides,
        budgets,
        preferences,
        st.none() | st.floats(0.01, 60),
        st.none() | st.integers(1, 10**6),
    )
    def test_holds_every_plan(self, duration, width, height, tokens, prefer, fps, total):
        assume(max(width, height) / min(width, height) < 200)
        plan = plan_or_none(
            duration, width, height, max_tokens=tokens, text_tokens=0, prefer=prefer, fps=fps, total_frames=total
        )
        if plan is None:
            return
        assert plan.tokens <= tokens and plan.num_frames >= 1
        assert plan.tokens == math.ceil(plan.num_frames / 2) * plan.frame_tokens
        assert plan.height % 28 == plan.width % 28 == 0 and plan.frame_tokens == plan.height * plan.width // 784
        assert plan.num_frames <= max((duration + 2e-3) * (fps or 4), 2) and plan.num_frames <= (total or math.inf)
        assert len(plan.times) == plan.num_frames and plan.times[-1] < plan.end == duration
        assert "\n" not in str(plan)

    @settings(max_examples=150, deadline=None)
    @given(
        st.floats(0.1, 60), sides, sides, st.integers(1, 3000), preferences, st.sampled_from([0.5, 4.0, 7.3]),
        st.none() | st.integers(1, 200),
    )  # fmt: skip
    def test_is_used_as_far_as_the_preference_goes(self, duration, width, height, tokens, prefer, fps, total):
        assume(max(width, height) / min(width, height) < 20)
        size = {"max_tokens": tokens, "text_tokens": 0, "total_frames": total, "default_fps": fps}
        plan = plan_or_none(duration, width, height, prefer=prefer, **size)
        plans = possible(duration, width, height, tokens, fps, total)
        if plan is None:
            assert not plans
            return
        most, largest = (
            max(pair[i] for pair in possible(duration, width, height, math.inf, fps, total)) for i in (0, 1)
        )
        better = {
            "pixels": lambda n, t: (t, n),
            "frames": lambda n, t: (n, t),
            "balanced": lambda n, t: (min(n / most, t / largest), n * t, t),
        }[prefer]
        chosen = better(math.ceil(plan.num_frames / 2), plan.frame_tokens)
        assert chosen == max(better(n, t) for n, t in plans)

    @settings(max_examples=100, deadline=None)
    @given(st.floats(0.5, 500), sides, sides, preferences)
    def test_that_is_ample_changes_nothing(self, duration, width, height, prefer):
        assume(max(width, height) / min(width, height) < 200)
        plan = plan_video(duration, width, height, max_tokens=10**9, prefer=prefer)
        assert (plan.height, plan.width) == smart_resize(height, width, 28, 28 * 28, 224 * 224)
        assert plan.num_frames == max(int((duration + 2e-3) * 4) // 2 * 2, 2)

    def test_of_128k_tokens_by_the_numbers(self):
        assert str(plan_video(**HOUR)) == (
            "4,334 frames of 280 × 168, 1.2 per second from 0.0 to 3600.0 s; "
            "60 tokens per 2 frames, 130,020 of 130,048 in all"
        )
        frames = plan_video(**HOUR, prefer="frames")
        assert (frames.num_frames, frames.frame_tokens) == (14_400, 18)
        balanced = plan_video(**HOUR, prefer="balanced")
        assert frames.num_frames > balanced.num_frames > 4334 and 60 > balanced.frame_tokens > 18

    def test_that_holds_no_two_frames_is_refused(self):
        with pytest.raises(
            ValueError, match="max_tokens=1,000 less text_tokens=1,024 leaves -24 for the video, but even"
        ):
            plan_video(**HOUR, max_tokens=1000)
        with pytest.raises(ValueError, match="leaves 3 for the video, but even 2 frames of 140 × 28 are 5 tokens"):
            plan_video(10, 1920, 60, max_tokens=3, text_tokens=0)


class TestWhatIsAskedFor:
    @settings(max_examples=100, deadline=None)
    @given(durations, sides, sides, st.integers(2000, 300_000), preferences, st.floats(0.05, 30))
    def test_frames_per_second_win_over_the_preference(self, duration, width, height, tokens, prefer, fps):
        assume(max(width, height) / min(width, height) < 200)
        plan = plan_or_none(duration, width, height, max_tokens=tokens, prefer=prefer, fps=fps)
        if plan:
            assert plan.num_frames == max(int((duration + 2e-3) * fps), 2) // 2 * 2
            sizes = [t for t, _ in frame_sizes(width, height, 784, 224 * 224, 28)]
            fitting = [t for t in sizes if t * plan.num_frames // 2 <= plan.budget]
            assert plan.frame_tokens == max(fitting)

    @settings(max_examples=100, deadline=None)
    @given(durations, sides, sides, st.integers(2000, 300_000), preferences, st.integers(1, 300))
    def test_tokens_per_patch_win_over_the_preference(self, duration, width, height, tokens, prefer, frame_tokens):
        assume(max(width, height) / min(width, height) < 20)
        try:
            plan = plan_or_none(duration, width, height, max_tokens=tokens, prefer=prefer, frame_tokens=frame_tokens)
        except AssertionError:
            with pytest.raises(ValueError, match="cannot hold a frame"):
                plan_video(duration, width, height, max_tokens=tokens, frame_tokens=frame_tokens)
            return
        if plan:
            assert plan.frame_tokens == max(
                t for t, _ in frame_sizes(width, height, 784, frame_tokens * 784, 28) if t <= frame_tokens
            )
            wanted = max(int((duration + 2e-3) * 4), 2) // 2
            assert math.ceil(plan.num_frames / 2) == min(wanted, plan.budget // plan.frame_tokens)

    def test_the_number_of_frames_and_their_size_are_exact(self):
        plan = plan_video(**HOUR, num_frames=100, max_pixels=1_000_000)
        assert (plan.num_frames, plan.height, plan.width) == (100, *smart_resize(1080, 1920, 28, 784, 1_000_000))
        plan = plan_video(**HOUR, start=60, end=70.5, fps=2)
        assert plan.num_frames == 20 and plan.times.tolist() == pytest.approx([60 + k * 10.5 / 20 for k in range(20)])

    @pytest.mark.parametrize(
        ("request_", "message"),
        [
            ({"fps": 4, "max_pixels": 50_176}, "leaves 130,048 .* but 14,400 frames of 280 × 168 are 432,000 tokens"),
            ({"num_frames": 4000, "frame_tokens": 300}, "4,000 frames of 644 × 336 are 552,000 tokens"),
            ({"fps": 30, "max_tokens": 20_000}, "leaves 18,976 .* but 108,000 frames of 28 × 28 are 54,000 tokens"),
            ({"fps": 4, "num_frames": 8}, "`fps` or `num_frames`, not both"),
            ({"max_pixels": 50_176, "frame_tokens": 64}, "`max_pixels` or `frame_tokens`, not both"),
            ({"frame_tokens": 3, "height": 60}, "frame_tokens=3 cannot hold a frame of 1920 × 60"),
            ({"prefer": "speed"}, "prefer must be one of pixels, frames, balanced; got 'speed'"),
            ({"num_frames": 9, "total_frames": 8}, "num_frames=9 is more than the 8 frames"),
            ({"max_tokens": 0}, "max_tokens must be a positive integer, got 0"),
            ({"frame_tokens": 6.5}, "frame_tokens must be a positive integer, got 6.5"),
            ({"start": 3600}, "start=3600 and end=None leave nothing of a video of 3600.000 s"),
            ({"start": 20, "end": 10}, "start=20 and end=10 leave nothing"),
            ({"start": -1}, "start=-1"),
            ({"block_size": 128}, "block_size=128 needs frames of 100,352 pixels, the most is 50,176"),
            ({"do_resize": False}, "do_resize=False needs sides that are multiples of 28, got 1920 × 1080"),
        ],
    )  # fmt: skip
    def test_what_cannot_be_is_refused(self, request_, message):
        with pytest.raises(ValueError, match=message):
            plan_video(**{**HOUR, **request_})


class TestBlocks:
    @settings(max_examples=200, deadline=None)
    @given(
        durations,
        sides,
        sides,
        st.sampled_from([16, 32, 64]),
        preferences,
        st.sampled_from([50_176, 200_704, 1_000_000]),
    )
    def test_patches_fill_whole_blocks(self, duration, width, height, block_size, prefer, pixels):
        plan = plan_video(duration, width, height, block_size=block_size, prefer=prefer, default_pixels=pixels)
        assert plan.frame_tokens % block_size == 0 and plan.tokens <= plan.budget
        assert plan.height * plan.width <= pixels

    def test_a_frame_is_stretched_no_more_than_needed(self):
        assert (plan_video(60, 1920, 1080, block_size=64).width, plan_video(60, 400, 400, block_size=64).width) == (
            224,
            224,
        )
        wide = plan_video(60, 1920, 1080, block_size=64, default_pixels=128 * 784)
        assert (wide.width, wide.height) == (16 * 28, 8 * 28)
        tall = plan_video(60, 1080, 1920, block_size=64, default_pixels=128 * 784)
        assert (tall.width, tall.height) == (8 * 28, 16 * 28)

    def test_a_small_frame_grows_to_one_block_and_no_further(self):
        plan = plan_video(60, 112, 112, block_size=64, default_pixels=1_000_000)
        assert (plan.width, plan.height) == (224, 224)
