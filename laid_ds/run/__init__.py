"""How a run lives: made, looked at, looped, recorded, in one folder."""
