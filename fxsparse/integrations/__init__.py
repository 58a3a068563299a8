"""Callbacks for the trainers of other libraries; nothing here is imported by the rest of fxsparse."""
