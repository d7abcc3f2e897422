"""SFT, DPO and reward modelling: one file each, with the loss and its wiring."""
