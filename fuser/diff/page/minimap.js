// All of a scene in a strip beside the graph, and where the view is in it.

const MINIMAP_WIDTH = 48;

class Minimap {
  constructor(pane) {
    this.pane = pane;
    this.canvas = pane.figure.querySelector("canvas.map");
    for (const kind of ["pointerdown", "pointermove"]) this.canvas.addEventListener(kind, (event) => this.jump(event));
  }

  get scales() {
    const { scene } = this.pane;
    return [this.canvas.width / scene.width, this.canvas.height / scene.height];
  }

  /** The scene, drawn once; the view's frame comes over it. */
  drawScene() {
    const { pane, canvas } = this;
    const { scene, painter } = pane;
    canvas.width = MINIMAP_WIDTH * pane.ratio;
    canvas.height = Math.max(1, pane.height) * pane.ratio;
    canvas.style.width = `${MINIMAP_WIDTH}px`;
    canvas.style.height = `${pane.height}px`;
    this.still = new OffscreenCanvas(canvas.width, canvas.height);
    const c = this.still.getContext("2d");
    const [sx, sy] = this.scales;
    painter.refresh();
    c.fillStyle = painter.colours.ground;
    c.fillRect(0, 0, canvas.width, canvas.height);
    c.fillStyle = painter.colours.paper;
    for (const { x, y, width, height } of scene.folds.filter(Boolean)) {
      c.fillRect(x * sx, y * sy, width * sx, height * sy);
    }
    for (let box = 0; box < scene.size; box++) {
      const { left, top, width } = scene.bounds(box);
      c.fillStyle = painter.lookOf(scene.node[box]).afar;
      c.fillRect(left * sx, top * sy, Math.max(1, width * sx), Math.max(1, BOX_HEIGHT * sy));
    }
  }

  drawView() {
    const { pane, canvas } = this;
    const { view } = pane;
    const c = canvas.getContext("2d");
    const [sx, sy] = this.scales;
    const width = Math.min(canvas.width - 3, (pane.width / view.scale) * sx);
    const height = Math.min(canvas.height - 3, Math.max(4, (pane.height / view.scale) * sy));
    const inside = (at, size, all) => Math.max(1.5, Math.min(all - size - 1.5, at));
    c.drawImage(this.still, 0, 0);
    c.strokeStyle = pane.painter.colours.accent;
    c.lineWidth = 1.5 * pane.ratio;
    c.strokeRect(inside(view.x * sx, width, canvas.width), inside(view.y * sy, height, canvas.height), width, height);
  }

  jump(event) {
    if (!event.buttons) return;
    const { pane, canvas } = this;
    const x = (event.offsetX / canvas.clientWidth) * pane.scene.width;
    const y = (event.offsetY / canvas.clientHeight) * pane.scene.height;
    pane.centre(x, y, pane.view.scale);
    pane.page.follow(pane);
  }
}
