"""Times of what a graph replays: launches captured once, so that the host is not what is measured."""

from collections.abc import Callable

from tinyvllm.kernels.driver import Event, Graph, Stream


def capture(stream: Stream, launch: Callable[[], None]) -> Graph:
    """What `launch` launches on this stream, as a graph; it runs once for itself before, and is compiled by that."""
    launch()
    stream.synchronize()
    with stream.capture() as captured:
        launch()
    return captured.graph


def graph_time(stream: Stream, graph: Graph) -> float:
    """Milliseconds of one replay."""
    before, after = Event(), Event()
    before.record(stream)
    graph.launch(stream)
    after.record(stream)
    return after.milliseconds_since(before)


def graph_times(stream: Stream, graph: Graph, rounds: int) -> list[float]:
    """Milliseconds of each of `rounds` replays, after one for nothing."""
    graph_time(stream, graph)
    return [graph_time(stream, graph) for _ in range(rounds)]


def graph_milliseconds(stream: Stream, launch: Callable[[], None], rounds: int) -> list[float]:
    """capture, then graph_times."""
    return graph_times(stream, capture(stream, launch), rounds)
