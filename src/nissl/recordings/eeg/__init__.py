"""EEG, MEG and intracranial signals: covariances, artefacts, discrete codes."""
