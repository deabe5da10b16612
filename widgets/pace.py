"""How often the feed sends a frame: as often as the eye likes it, as seldom as the engine needs it."""

FRAMES_PER_SECOND = 20
MANY_TOPICS = 4  # from so many visible topics on, which are as many pictures to draw in every frame,
FRAMES_OF_MANY = 15  # so many frames: 100 ms from an event to its pixels are still kept
SHARE = 0.03  # of the interpreter's time that frames may take: engine and pump share it
SLOWEST_S = 0.25  # but not slower than this


class Pace:
    """Chooses the time between two frames by what frames have cost.

    frames_per_second: the most, whatever they cost.
    """

    def __init__(self, frames_per_second: float):
        if not frames_per_second > 0:
            raise ValueError(f"frames_per_second must be above 0, got {frames_per_second!r}")
        self.least_s = 1.0 / frames_per_second
        self.cost_s = 0.0  # processor time of a frame: a moving average over about ten

    def spent(self, seconds: float) -> None:
        """Note the processor time that a frame took. One that took much longer (a snapshot) counts as four."""
        if self.cost_s:
            seconds = min(seconds, 4 * self.cost_s)
        self.cost_s += 0.1 * (seconds - self.cost_s)

    def interval_s(self, num_topics: int) -> float:
        """From one frame to the next, while so many topics are visible."""
        by_eye = 1.0 / FRAMES_OF_MANY if num_topics >= MANY_TOPICS else 0.0
        return max(self.least_s, by_eye, min(self.cost_s / SHARE, SLOWEST_S))
