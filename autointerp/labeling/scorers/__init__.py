"""One file per scorer; they register themselves with `autointerp.labeling.base.SCORERS`."""
