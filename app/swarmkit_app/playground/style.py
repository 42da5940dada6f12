"""How the page looks: colours, fonts, and what the keyboard does everywhere."""

from __future__ import annotations

from pathlib import Path

import gradio as gr

_FONT = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"]
_MONO = ["ui-monospace", "Consolas", "monospace"]

CSS = """
.sk-summary { min-height: 3em; }
.sk-picture { overflow: hidden !important; }
.sk-scroll { overflow-x: auto; }
.sk-scroll svg { min-width: 460px; }
:is(.sk-scroll, .sk-tokens) table { border-collapse: collapse; font-size: 13px; margin: 8px 0; }
.sk-scroll table { white-space: nowrap; }
.sk-scroll td:last-child { white-space: normal; min-width: 11em; }
:is(.sk-scroll, .sk-tokens) :is(table, thead, tr, th, td) { border: 0 !important; }
:is(.sk-scroll, .sk-tokens) :is(th, td) { border-bottom: 1px solid var(--neutral-300) !important; }
.dark :is(.sk-scroll, .sk-tokens) :is(th, td) { border-bottom-color: var(--neutral-600) !important; }
.sk-actions { gap: 8px; }
.sk-actions button { flex: 1 1 auto !important; white-space: nowrap; padding: 6px 4px; font-size: 14px; }
:is(button, input, select, textarea, summary, [tabindex]):focus-visible {
  outline: 2px solid var(--primary-500) !important;
  outline-offset: 2px !important;
}
.sk-tokens { min-height: 6em; padding: 8px; line-height: 1.7; }
.sk-tokens { white-space: pre-wrap; overflow-wrap: anywhere; }
.sk-tokens details { margin-top: 12px; white-space: normal; overflow-x: auto; }
.sk-answer { min-height: 8em; }
pre, pre code { white-space: pre-wrap !important; overflow-wrap: anywhere; }
button[role=tab][aria-selected=true] { color: var(--primary-700) !important; }
.dark button[role=tab][aria-selected=true] { color: var(--primary-300) !important; }
footer { display: none !important; }
@media (prefers-reduced-motion: reduce) { .sk-picture circle { display: none; } }
"""

HEAD = f"<script>\n{(Path(__file__).parent / 'static' / 'page.js').read_text(encoding='utf-8')}</script>"
"""What the page does by itself: it counts clicks, keeps conversations, and lets Escape press Stop."""


def theme() -> gr.Theme:
    """Colours and fonts; all fonts are the reader's own, so that nothing is fetched."""
    soft = gr.themes.Soft(font=_FONT, font_mono=_MONO)  # type: ignore[arg-type]
    # The theme's own labels are too pale on its light ground to be read by everybody (WCAG 2, contrast 4.5).
    return soft.set(
        body_background_fill="*neutral_50",
        block_border_width="1px",
        block_border_color="*neutral_200",
        input_border_width="1px",
        input_border_color="*neutral_300",
        input_border_color_dark="*neutral_600",
        button_secondary_border_color="*neutral_300",
        button_border_width="1px",
        block_title_text_color="*primary_800",
        block_label_text_color="*primary_800",
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_300",
        input_placeholder_color="*neutral_500",
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_dark="*primary_600",
        button_primary_background_fill_hover="*primary_700",
        button_primary_background_fill_hover_dark="*primary_700",
        checkbox_label_background_fill_selected="*primary_600",
    )


def scrolling(content: str, label: str = "Pipeline") -> str:
    """A part of the page that scrolls sideways on narrow windows, by keyboard, too."""
    return f'<div class="sk-scroll" tabindex="0" role="region" aria-label="{label}">{content}</div>'
