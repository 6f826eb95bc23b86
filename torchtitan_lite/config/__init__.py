"""Configuration: the generic loader (`load`) and this project's composition of sections (`job`)."""
