// What the browser keeps: the last runs, the address, what is copied, and where the focus is. Python
// is asked through hidden buttons (`history.py`, `what_if.py`).
(() => {
  if (window.spectr) return;
  const MOST = 20;
  const find = (what) => document.querySelector(what);
  const spectr = (window.spectr = { wanted: '', picked: '' });

  // Runs, in the browser's database: {id, title, columns, query, file, at}
  const opened = new Promise((done, failed) => {
    const request = indexedDB.open('spectr', 1);
    request.onupgradeneeded = () => request.result.createObjectStore('runs', { keyPath: 'id' });
    request.onsuccess = () => done(request.result);
    request.onerror = () => failed(request.error);
  });
  const inStore = async (mode, use) => {
    const transaction = (await opened).transaction('runs', mode);
    const request = use(transaction.objectStore('runs'));
    return new Promise((done, failed) => {
      transaction.oncomplete = () => done(request?.result);
      transaction.onerror = transaction.onabort = () => failed(transaction.error);
    });
  };
  const runs = async () => (await inStore('readonly', (store) => store.getAll()))
    .sort((a, b) => b.at - a.at);
  // A browser that keeps nothing (private windows, storage full) still shows all that is new.
  const orNothing = (promise) => promise.catch((error) => console.warn('spectr:', error));

  spectr.keep = (text) => {
    const run = text ? JSON.parse(text) : null;
    if (!run) return;
    if (!run.file) {
      goTo(run.query);
      return;
    }
    goTo(`${run.query}&run=${run.id}`);
    orNothing((async () => {
      await inStore('readwrite', (store) => store.put({ ...run, at: Date.now() }));
      for (const old of (await runs()).slice(MOST)) {
        await inStore('readwrite', (store) => store.delete(old.id));
      }
      await list();
    })());
  };

  // The address
  const query = () => new URLSearchParams(location.search);
  const goTo = (text) => {
    const told = new URLSearchParams(text);
    // Gradio's own, such as the theme, stay.
    query().forEach((value, name) => { if (name.startsWith('__')) told.set(name, value); });
    const next = `?${told}`;
    if (next !== location.search) history.pushState(null, '', next);
    tellSpace();
  };
  const setParameter = (name, value) => {
    const now = query();
    if (value === null) now.delete(name);
    else now.set(name, value);
    const text = now.toString();
    history.replaceState(null, '', text ? `?${text}` : location.pathname);
    tellSpace();
  };
  // A Space is a frame; the page around it may follow.
  const tellSpace = () => {
    if (window.parent !== window) {
      window.parent.postMessage({ queryString: shared(location.search) }, 'https://huggingface.co');
    }
  };
  const shared = (text) => {
    const told = new URLSearchParams(text);
    for (const name of [...told.keys()]) if (name === 'run' || name.startsWith('__')) told.delete(name);
    return told.toString();
  };
  const asked = async () => {
    const now = query();
    const id = now.get('run');
    const run = id ? await orNothing(inStore('readonly', (store) => store.get(id))) : null;
    return { query: now.toString(), column: now.get('column') ?? '', file: run?.file ?? null };
  };
  const restore = async () => {
    const told = await asked();
    spectr.wanted = JSON.stringify(told);
    find('#restore').click();
  };
  window.addEventListener('popstate', restore);
  document.addEventListener('spectr:pin', (event) => setParameter('token', event.detail));
  document.addEventListener('change', (event) => {
    if (event.target.closest('#column')) setParameter('column', event.target.value);
  });

  // The list of runs
  const element = (kind, text, attributes = {}) => {
    const made = document.createElement(kind);
    made.textContent = text;
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    return made;
  };
  const list = async () => {
    const host = find('#runs');
    if (!host) return;
    host.dataset.isFilled = 'yes';
    const kept = await runs();
    if (!kept.length) {
      host.replaceChildren(element('p', 'No run is kept yet.', { class: 'caption' }));
      return;
    }
    const items = kept.map((run) => {
      const item = document.createElement('li');
      const time = new Date(run.at).toLocaleString(undefined, { dateStyle: 'medium', timeStyle: 'short' });
      const tick = element('input', '', {
        type: 'checkbox', value: run.id, 'aria-label': `Compare the run “${run.title}” of ${time}`,
      });
      const show = element('button', run.title, { type: 'button', 'data-run': run.id });
      item.append(tick, show, element('small', `${time}, ${run.columns} columns`));
      return item;
    });
    const both = element('button', 'Compare the two that are ticked', {
      type: 'button', id: 'compare-two', disabled: '',
    });
    const forget = element('button', 'Forget all', { type: 'button', id: 'forget-runs' });
    const rows = document.createElement('ol');
    rows.append(...items);
    host.replaceChildren(rows, both, forget);
  };
  const ticked = () => [...document.querySelectorAll('#runs input:checked')];
  document.addEventListener('change', (event) => {
    if (!event.target.closest('#runs')) return;
    find('#compare-two').disabled = ticked().length !== 2;
  });
  document.addEventListener('click', async (event) => {
    const shown = event.target.closest('#runs [data-run]');
    if (shown) {
      const run = await inStore('readonly', (store) => store.get(shown.dataset.run));
      goTo(`${run.query}&run=${run.id}`);
      await restore();
      find('#answers').scrollIntoView({ block: 'nearest' });
    } else if (event.target.closest('#compare-two')) {
      // As they stand in the list, the older one first
      const ids = ticked().map((tick) => tick.value).reverse();
      const both = await Promise.all(ids.map((id) => inStore('readonly', (store) => store.get(id))));
      spectr.wanted = JSON.stringify(both.map((run) => run.file));
      find('#compare-runs').click();
    } else if (event.target.closest('#forget-runs')) {
      await inStore('readwrite', (store) => store.clear());
      await list();
    }
  });

  // Copies
  const link = ({ query: text, space }) => {
    const now = new URLSearchParams(text);
    for (const name of ['column', 'token']) {
      const value = query().get(name);
      if (value !== null) now.set(name, value);
    }
    const start = space ? `https://huggingface.co/spaces/${space}` : location.origin + location.pathname;
    return `${start}?${now}`;
  };
  document.addEventListener('click', async (event) => {
    const button = event.target.closest('button.copy');
    if (!button) return;
    const { copy, query: text } = button.dataset;
    const answer = () => button.closest('.answer').querySelector('.text').textContent;
    const copied = text !== undefined ? link(button.dataset) : copy ?? answer();
    const name = button.textContent;
    try {
      await navigator.clipboard.writeText(copied);
      button.textContent = 'Copied';
    } catch {
      button.textContent = 'This browser does not allow it';
    }
    setTimeout(() => { button.textContent = name; }, 1500);
  });

  // A click on an expert in the routing view asks what if
  document.addEventListener('click', (event) => {
    const expert = event.target.closest('#routing [data-expert]');
    if (!expert) return;
    const t = query().get('token');
    spectr.picked = JSON.stringify({ expert: expert.dataset.expert, t: t === null ? null : +t });
    find('#pick').click();
    find('#what-if').scrollIntoView({ behavior: 'smooth', block: 'nearest' });
  });

  // A button that is switched off loses the focus: it goes to the one that is switched on instead.
  let last = null;
  document.addEventListener('focusin', (event) => { last = event.target; });
  new MutationObserver((changes) => {
    for (const { target } of changes) {
      const other = { run: '#stop', stop: '#run' }[target.id];
      if (other && target.disabled && last === target && !document.activeElement?.matches('input, textarea')) {
        find(other)?.focus({ preventScroll: true });
      }
    }
  }).observe(document.body, { subtree: true, attributes: true, attributeFilter: ['disabled'] });

  find('#announce')?.setAttribute('aria-live', 'polite');
  // A fold that is closed has nothing in it: the list is filled when it is there.
  new MutationObserver(() => {
    const host = find('#runs');
    if (host && !host.dataset.isFilled) orNothing(list());
    // Gradio names a plot that is still empty, which only an element with a role may be.
    document.querySelectorAll('.empty[aria-label]:not([role])')
      .forEach((empty) => empty.setAttribute('role', 'img'));
  }).observe(document.body, { childList: true, subtree: true });
  if ([...query().keys()].some((name) => !name.startsWith('__') && name !== 'view')) restore();

  if (innerWidth <= 620) find('.masthead details').open = false;
  // The page is shown once its height has been the same for some frames.
  const settle = (height, frames) => {
    const now = document.documentElement.scrollHeight;
    if (frames === 0) document.documentElement.classList.add('is-ready');
    else requestAnimationFrame(() => settle(now, now === height ? frames - 1 : 12));
  };
  settle(0, 12);
})();
