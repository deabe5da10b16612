"""What the control bar asks for. Every refusal comes back in the engine's own words."""

from typing import TYPE_CHECKING, Any

from widgets.answers.base import answers
from widgets.controls import ControlError, Controls

if TYPE_CHECKING:
    from widgets.feed import Feed

PLAIN = ("pause", "resume")


@answers("control")
def control(feed: "Feed", do: str, **arguments: Any) -> dict[str, Any] | None:
    """do: pause, resume, step (count), stop, reset (options), speed (steps_per_second), rate (factor, of a recorded
    run), policy (options), arrivals (rate), burst (count), record, save (name), replay (name), live."""
    controls = Controls.of(feed)
    if do in PLAIN:
        getattr(controls.engine, do)()
    elif do == "step":
        controls.engine.step(**arguments)
    elif do == "stop":
        controls.stop()
    elif do == "reset":
        controls.reset(**arguments)
    elif do == "speed":
        controls.engine.set_speed(**arguments)
    elif do == "rate":
        _replay_only(controls).set_rate(**arguments)
    elif do == "policy":
        controls.engine.set_policy(**arguments)
    elif do == "arrivals":
        _set_rate(controls, **arguments)
    elif do == "burst":
        controls.burst(**arguments)
    elif do == "record":
        controls.record()
    elif do == "save":
        controls.stop_recording(**arguments)
        return controls.recorded
    elif do == "replay":
        controls.replay(**arguments)
    elif do == "live":
        controls.back_to_live()
    else:
        raise ControlError(f"there is nothing called {do!r} to do")
    return None


def _set_rate(controls: Controls, rate: float) -> None:
    if rate and "arrivals" in controls.cannot():
        raise ControlError(controls.cannot()["arrivals"])
    controls.arrivals.set_rate(rate)


def _replay_only(controls: Controls) -> Any:
    if controls.engine.kind != "replay":
        raise ControlError("only a recorded run has a rate; a live engine has a speed")
    return controls.engine
