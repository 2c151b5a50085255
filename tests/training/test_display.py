"""What the display says of the time that is left."""

from ssl_global.training import progress
from ssl_global.training.progress import Display


def test_the_time_left_is_that_of_the_steps_alone(monkeypatch, capsys):
    """What came before the first step (a minute here: the untrained encoder is judged) is not counted."""
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    display = Display(100, start_step=0, visible=True)
    clock[0] = 60.0
    for step in range(1, 12):
        clock[0] += 1.5
        display.step(step)
        display.show(step, {"loss": 1.0})
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "step 1/100  loss 1.0000"
    assert lines[-1] == "step 11/100  loss 1.0000  left 2:13"
