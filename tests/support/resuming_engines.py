"""Loads one of a run's own checkpoints, as the run does when it resumes."""

from incr_ds.train.checkpoints import saved_state


def load_own(engine, run, folder, architecture):
    """Refuse ``folder`` unless ``run`` continues it, then load it into ``engine``."""
    state = saved_state(run, folder, {}, architecture, run.layout)
    engine.load(folder, f"global_step{state.position.step}")
