"""The look of the page: system fonts, quiet greys, and colour for experts alone."""

from pathlib import Path

import gradio as gr

from spectr_demo import charts

CSS = Path(__file__).with_name("style.css")
TABS_CSS = Path(__file__).with_name("tabs.css")  # of the tabs but the first
STATE, UPLOAD = (Path(__file__).with_name(name) for name in ("state.js", "upload.js"))
# What a pointer and keys do in the routing view and in the answers, what the browser keeps, what
# the address says, and how a file is sent.
SCRIPT = "() => {{ {} {} {} }}".format(
    *(path.read_text(encoding="utf-8") for path in (charts.SCRIPT, STATE, UPLOAD))
)

# On a phone the answers are below the form: a run brings them into view.
SHOW_RESULTS = """() => {
  document.querySelector('#results').scrollIntoView({behavior: 'smooth', block: 'nearest'});
}"""


# Gradio builds the page bit by bit. It is shown once it stands, so that nothing moves under the
# reader; without a script, after some seconds.
HEAD = """<style>
html:not(.is-ready) .gradio-container { visibility: hidden; animation: appear 0s 4s forwards; }
@keyframes appear { to { visibility: visible; } }
</style>"""


def theme() -> gr.themes.Base:
    """Fonts are the visitor's own: a font from elsewhere would be a request to another host."""
    return gr.themes.Base(
        primary_hue=gr.themes.colors.slate,
        secondary_hue=gr.themes.colors.slate,
        neutral_hue=gr.themes.colors.slate,
        radius_size=gr.themes.sizes.radius_lg,
        font=["system-ui", "-apple-system", "Segoe UI", "Roboto", "DejaVu Sans", "sans-serif"],
        font_mono=["ui-monospace", "SFMono-Regular", "Menlo", "DejaVu Sans Mono", "monospace"],
    ).set(
        body_background_fill="#f6f7f9",
        body_background_fill_dark="#0f1117",
        block_background_fill="#ffffff",
        block_background_fill_dark="#161a22",
        block_radius="12px",
        container_radius="12px",
        input_radius="8px",
        button_large_radius="10px",
        block_border_width="1px",
        block_border_color="#e3e6eb",
        block_border_color_dark="#262c37",
        block_shadow="none",
        block_label_background_fill="transparent",
        block_label_background_fill_dark="transparent",
        block_label_border_width="0px",
        block_title_text_weight="600",
        # Gradio's own greys have too little contrast for small text.
        body_text_color_subdued="#576071",
        body_text_color_subdued_dark="#a3acba",
        block_info_text_color="#576071",
        block_info_text_color_dark="#a3acba",
        block_label_text_color="#576071",
        block_label_text_color_dark="#a3acba",
        block_title_text_color="#3c4555",
        block_title_text_color_dark="#c4cad4",
        input_placeholder_color="#6b7482",
        input_placeholder_color_dark="#98a1af",
        input_border_width="1px",
        input_border_color="#8b93a1",
        input_border_color_dark="#6b7482",
        input_background_fill="#ffffff",
        input_background_fill_dark="#11151c",
        button_primary_background_fill="#1f2937",
        button_primary_background_fill_hover="#374151",
        button_primary_background_fill_dark="#e5e7eb",
        button_primary_background_fill_hover_dark="#ffffff",
        button_primary_text_color="#ffffff",
        button_primary_text_color_dark="#0f1117",
    )
