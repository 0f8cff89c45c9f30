// What a pointer and keys do in the routing view, and in the answer that it belongs to. All
// listeners are the document's, since views and answers are replaced while a run goes on.
(() => {
  if (window.spectrRoutingView) return;
  window.spectrRoutingView = true;
  const states = new WeakMap(); // by the element that holds a view, which stays
  // The token that the page's address names is pinned when the page opens.
  const linked = (host) => {
    const token = host.id === 'routing' ? new URLSearchParams(location.search).get('token') : null;
    return token === null || Number.isNaN(+token) ? {} : { t: +token, pinned: true };
  };
  const stateOf = (rv) => {
    const host = rv.closest('#routing') ?? rv.parentElement;
    if (states.get(host)?.run !== rv.dataset.run) {
      states.set(host, {
        run: rv.dataset.run, open: {}, left: {}, t: null, layer: null, ...(states.has(host) ? {} : linked(host)),
      });
    }
    return states.get(host);
  };
  const all = (root, what) => [...root.querySelectorAll(what)];
  const cardOf = (rv) => all(document, '.answer[data-column]')
    .find((card) => card.dataset.column === rv.dataset.column);
  const viewOf = (card) => all(document, '.rv')
    .find((rv) => rv.dataset.column === card.dataset.column);
  const cardTokenOf = (rv, { t }) => (t === null ? undefined
    : cardOf(rv)?.querySelectorAll('.text i')[t - rv.dataset.first]);
  const numOf = (block) => +block.style.getPropertyValue('--n');
  const blockOf = (rv, t) => all(rv, '.rv-block').find((block) => {
    const at = t - block.dataset.start;
    return at >= 0 && at < numOf(block);
  });
  const line = (kind, text) => {
    const p = document.createElement('p');
    p.className = kind;
    p.textContent = text;
    return p;
  };

  // What a layer's cells say of a token
  const layerLines = (rv, block, t, layer) => {
    const names = JSON.parse(rv.dataset.names);
    const told = (kind, say) => {
      const svg = block.querySelector(`[data-${kind}]`);
      if (!svg) return [];
      const cell = +svg.dataset[kind].split(',')[layer * numOf(block) + t - block.dataset.start];
      const words = cell < 0 ? 'no expert' : say(names[cell >> 7], cell & 127);
      return [`${kind === 'best' ? 'first ' : 'most used '}${words}`];
    };
    const found = [
      ...told('best', (name, lead) => `${name}, ${lead}% ahead`),
      ...told('used', (name, weight) => `${name}, weight ${weight}%`),
    ];
    return [line('rv-more', `Layer ${layer}: ${found.join('; ')}`)];
  };

  const tell = (rv, state) => {
    const told = rv.querySelector('.rv-told');
    // What the server wrote, which has no mark of this script
    if (!told.dataset.own) state.ofAll = [...told.childNodes];
    const row = state.t === null ? null : rv.querySelector(`tr[data-t="${state.t}"]`);
    if (!row) {
      told.replaceChildren(...state.ofAll);
      delete told.dataset.own;
      return;
    }
    told.dataset.own = 'yes';
    const [number, part, text, list, logprob, kl, next] = row.cells;
    const head = line('rv-head', '');
    const token = document.createElement('b');
    token.textContent = text.textContent;
    head.append(`${part.textContent} token ${number.textContent}: “`, token, '”');
    const block = blockOf(rv, state.t);
    told.replaceChildren(
      head,
      list.firstChild.cloneNode(true),
      line('rv-more', `log-probability ${logprob.textContent}, KL from the base ${kl.textContent}`),
      ...(next.firstElementChild
        ? [line('rv-more', 'Likeliest here:'), next.firstElementChild.cloneNode(true)] : []),
      ...(state.layer !== null && block ? layerLines(rv, block, state.t, state.layer) : []),
      line('rv-more', state.pinned ? 'Pinned. Enter or Escape lets it go.' : 'Enter pins it.'),
    );
  };

  const show = (rv) => {
    const state = stateOf(rv);
    rv.classList.toggle('is-pinned', Boolean(state.pinned));
    const here = state.t === null ? null : blockOf(rv, state.t);
    for (const block of all(rv, '.rv-block')) {
      const mark = block.querySelector('.rv-mark');
      mark.hidden = block !== here;
      if (block === here) mark.style.setProperty('--at', state.t - block.dataset.start);
    }
    all(document, '.answer .is-marked').forEach((token) => token.classList.remove('is-marked'));
    cardTokenOf(rv, state)?.classList.add('is-marked');
    tell(rv, state);
  };

  const mark = (rv, t, layer = null) => {
    const state = stateOf(rv);
    if (state.t === t && state.layer === layer) return;
    Object.assign(state, { t, layer });
    show(rv);
  };
  const pin = (rv, t, layer = null) => {
    const state = stateOf(rv);
    const isSame = state.pinned && state.t === t;
    Object.assign(state, isSame ? { pinned: false } : { t, layer, pinned: true });
    show(rv);
    told(rv, state);
  };
  const told = (rv, { pinned, t }) => {
    if (!rv.closest('#routing')) return;
    document.dispatchEvent(new CustomEvent('spectr:pin', { detail: pinned ? t : null }));
  };

  // The token and the layer under a pointer
  const placeOf = (event) => {
    const block = event.target.closest?.('.rv-block');
    if (!block) return null;
    const box = block.getBoundingClientRect();
    const num = numOf(block);
    const at = Math.floor(((event.clientX - box.left) / box.width) * num);
    const t = +block.dataset.start + Math.min(num - 1, Math.max(0, at));
    const map = event.target.closest('.rv-map');
    if (!map) return [t, null];
    const { top, height } = map.getBoundingClientRect();
    const layers = map.viewBox.baseVal.height;
    const row = Math.floor(((event.clientY - top) / height) * layers);
    return [t, layers - 1 - Math.min(layers - 1, Math.max(0, row))];
  };
  const tokenOf = (event) => {
    const token = event.target.closest?.('.answer[data-column] .text i');
    const card = token?.closest('.answer');
    return card ? { card, at: all(card, '.text i').indexOf(token) } : null;
  };

  document.addEventListener('pointermove', (event) => {
    const place = placeOf(event);
    const rv = event.target.closest?.('.rv');
    if (place && !stateOf(rv).pinned) mark(rv, ...place);
    const token = tokenOf(event);
    const other = token && viewOf(token.card);
    if (other && !stateOf(other).pinned) mark(other, +other.dataset.first + token.at);
  });
  document.addEventListener('pointerout', (event) => {
    const from = event.target.closest?.('.rv-plot, .rv-prompt, .answer .text');
    if (!from || from.contains(event.relatedTarget)) return;
    const rv = from.closest('.rv') ?? viewOf(from.closest('.answer'));
    if (rv && !stateOf(rv).pinned && !from.contains(document.activeElement)) mark(rv, null);
  });
  document.addEventListener('click', (event) => {
    const place = placeOf(event);
    if (place) pin(event.target.closest('.rv'), ...place);
    const token = tokenOf(event);
    if (!token) return;
    const rv = viewOf(token.card);
    if (rv) {
      pin(rv, +rv.dataset.first + token.at);
      return;
    }
    // Of another column: its view is asked for, with this token pinned.
    const choice = all(document, '#column input')
      .find((input) => input.value === token.card.dataset.column);
    const shown = document.querySelector('#routing .rv');
    if (!choice || !shown) return;
    Object.assign(stateOf(shown), { t: +shown.dataset.first + token.at, layer: null, pinned: true });
    told(shown, stateOf(shown));
    choice.click();
  });

  const STEPS = { ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity };
  document.addEventListener('keydown', (event) => {
    const plot = event.target.closest?.('.rv-plot');
    if (!plot || event.target !== plot || event.ctrlKey || event.metaKey || event.altKey) return;
    const rv = plot.closest('.rv');
    const state = stateOf(rv);
    const blocks = all(rv, '.rv-block').filter((block) => block.checkVisibility());
    if (!blocks.length) return;
    const tokens = blocks
      .flatMap((block) => Array.from({ length: numOf(block) }, (_, i) => +block.dataset.start + i))
      .sort((a, b) => a - b);
    const first = tokens.indexOf(+rv.dataset.first);
    const at = tokens.indexOf(state.t);
    const layers = blocks[0].querySelector('.rv-map')?.viewBox.baseVal.height;
    if (event.key in STEPS) {
      const next = at < 0 ? Math.max(0, first) : at + STEPS[event.key];
      mark(rv, tokens[Math.min(tokens.length - 1, Math.max(0, next))], state.layer);
      const block = blockOf(rv, state.t);
      const scroll = block.parentElement;
      const x = ((state.t - block.dataset.start + 0.5) / numOf(block)) * block.offsetWidth;
      scroll.scrollLeft = Math.min(Math.max(scroll.scrollLeft, x - scroll.clientWidth + 40), x - 40);
    } else if (layers && (event.key === 'ArrowUp' || event.key === 'ArrowDown')) {
      const step = event.key === 'ArrowUp' ? 1 : -1;
      const layer = state.layer === null ? (step > 0 ? 0 : layers - 1) : state.layer + step;
      mark(rv, at < 0 ? tokens[Math.max(0, first)] : state.t, Math.min(layers - 1, Math.max(0, layer)));
    } else if (event.key === 'Enter' && state.t !== null) {
      pin(rv, state.t, state.layer);
    } else if (event.key === 'Escape') {
      Object.assign(state, { t: null, layer: null, pinned: false });
      show(rv);
      told(rv, state);
    } else {
      return;
    }
    event.preventDefault();
  });

  // A view that is drawn anew goes on where it was: folds, scroll, and the marked token. The page
  // may replace elements, or change those that are there.
  document.addEventListener('toggle', (event) => {
    const rv = event.target.closest?.('.rv');
    if (rv) stateOf(rv).open[event.target.className] = event.target.open;
  }, true);
  document.addEventListener('scroll', (event) => {
    const rv = event.target.closest?.('.rv');
    if (rv) stateOf(rv).left[all(rv, '.rv-scroll').indexOf(event.target)] = event.target.scrollLeft;
  }, true);
  const takeUp = (rv, state) => {
    for (const [kind, open] of Object.entries(state.open)) {
      const fold = rv.getElementsByClassName(kind)[0];
      if (fold) fold.open = open;
    }
    all(rv, '.rv-scroll').forEach((scroll, at) => {
      if (state.left[at]) scroll.scrollLeft = state.left[at];
    });
    show(rv);
  };
  new MutationObserver(() => {
    for (const rv of all(document, '.rv')) {
      const state = stateOf(rv);
      const marked = cardTokenOf(rv, state);
      if (state.drawn !== rv.dataset.drawn) {
        state.drawn = rv.dataset.drawn;
        takeUp(rv, state);
      } else if (marked && !marked.classList.contains('is-marked')) {
        show(rv);
      }
    }
  }).observe(document.body, {
    childList: true, subtree: true, attributes: true, attributeFilter: ['class', 'data-drawn'],
  });
})();
