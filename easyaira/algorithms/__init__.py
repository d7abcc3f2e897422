"""SFT, DPO and reward modelling: each file has its loss and its wiring."""
