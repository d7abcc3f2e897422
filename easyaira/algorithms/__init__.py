"""SFT, DPO, reward modelling and on-policy training: the losses and their wiring."""
