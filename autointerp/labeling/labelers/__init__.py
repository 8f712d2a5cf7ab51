"""One file per labeler; they register themselves with `autointerp.labeling.base.LABELERS`."""
