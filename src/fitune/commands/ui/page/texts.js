// Every text of the page, in English and Chinese. What checks and errors say is English, as on the command line.
export const TEXTS = {
  switch_language: ['Language', '语言'], switch_theme: ['Light or dark', '浅色或深色'], tasks: ['Tasks', '任务'],
  choose_tab: ['Model and data', '模型与数据'], plan_tab: ['Plan', '规划'], train_tab: ['Train', '训练'], runs_tab: ['Runs', '结果'], chat_tab: ['Chat', '对话'], export_tab: ['Export', '导出'],
  choose_title: ['Choose a model and data', '选择模型和数据'], plan_title: ['How much memory it takes', '需要多少内存'],
  train_title: ['Train, and watch', '训练并观察'], runs_title: ['All runs', '全部训练结果'], chat_title: ['Talk to base and tuned model', '与基座模型和微调后的模型对话'], export_title: ['Merge, export, download', '合并、导出、下载'],
  model: ['Model', '模型'], model_hint: ['folder, name of the catalog, or hub id', '目录、目录表中的名称，或 hub id'],
  data: ['Training data', '训练数据'], data_hint: ['path of a file or folder', '文件或目录的路径'], add: ['Add', '添加'],
  browse_model: ['Folders…', '浏览目录…'], browse_data: ['Folders…', '浏览目录…'], browse: ['Choose', '选择'], close: ['Close', '关闭'],
  bundled_model: ['Bundled small model', '自带的小模型'], bundled_data: ['Bundled data', '自带的数据'], chosen_data: ['Chosen data', '已选数据'],
  drop_here: ['Drop files here: JSON, JSONL, CSV, TSV, Parquet.', '把文件拖到这里：JSON、JSONL、CSV、TSV、Parquet。'], upload: ['Upload…', '上传…'],
  remove: ['Remove', '移除'], show_rows: ['Show rows', '查看数据行'], how_many: ['rows token by token', '行逐词元显示'],
  choose_both: ['Choose a model and data first.', '请先选择模型和数据。'], choose_model: ['Choose a model first.', '请先选择模型。'],
  reading: ['Reading and checking…', '正在读取并检查…'], connection_lost: ['The connection was lost.', '连接已断开。'],
  kind_folder: ['folder', '目录'], kind_cache: ['in the cache', '缓存中'], kind_bundled: ['bundled', '自带'], kind_catalog: ['catalog, to plan', '目录表，可用于规划'],
  rows_read: ['rows read', '读取行数'], rows_kept: ['rows kept', '保留行数'], rows_dropped: ['dropped', '丢弃'], rows_bad: ['bad rows', '坏行'],
  'rows_prompts cut': ['prompts cut', '提示被截断'], 'rows_answers cut': ['answers cut', '回答被截断'], rows_duplicates: ['duplicates', '重复行'],
  'rows_empty answers': ['empty answers', '空回答'], 'rows_tokens trained': ['tokens trained', '参与训练的词元'], 'rows_max length': ['max length', '最大长度'],
  'rows_median length': ['median length', '长度中位数'],
  token_by_token: ['Rows, token by token', '逐词元查看'], trained: ['trained', '参与训练'], ids_and_labels: ['with ids and labels', '带 id 与标签'], border: ['border between prompt and answer', '提示与回答的分界'],
  checks: ['Checks', '检查'], check: ['check', '检查项'], found: ['found', '结果'], bad_rows: ['bad rows', '坏行'], fix: ['fix', '修复'], lengths: ['Rows by length', '按长度分布'],
  level_ok: ['passed', '通过'], level_fixed: ['fixed', '已修正'], level_warn: ['warning', '警告'], level_refuse: ['refused', '拒绝'],
  tokens: ['tokens', '词元'], rows: ['rows', '行'], copy: ['Copy', '复制'], copied: ['Copied', '已复制'], same_command: ['The command that does the same', '等效命令'],
  set_objective: ['Objective', '目标'], set_method: ['Method', '方法'], set_rank: ['LoRA rank', 'LoRA 秩'], set_batch_size: ['Batch size', '批大小'], set_accumulation: ['Accumulation', '梯度累积'],
  set_max_length: ['Max length', '最大长度'], set_quant: ['Quantizer', '量化'], set_checkpointing: ['Activation checkpointing', '激活检查点'],
  set_precision: ['Precision', '精度'], set_optimizer: ['Optimizer', '优化器'], set_gpu: ['Fits on', '目标设备'], set_gpu_size: ['GPU memory', '显存'],
  off: ['off', '关'], on: ['on', '开'], this_machine: ['this machine', '本机'], by_size: ['a GPU of this size', '按显存大小'],
  fits: ['Fits:', '放得下：'], does_not_fit: ['Does not fit:', '放不下：'], needed: ['needed', '需要'], there_are: ['there are', '可用'],
  traced: ['Traced: the code that trains, on paper.', '已追踪：训练代码在纸面上执行的结果。'], estimate: ['Estimate by closed forms; the traced plan follows.', '按公式估算；追踪结果随后给出。'],
  part: ['part', '组成'], memory: ['memory', '内存'], largest_step: ['Largest micro-batch', '最大的微批次'], trainable: ['parameters trained', '个参数参与训练'],
  what_fits: ['What fits?', '什么放得下？'], searching: ['Looking at methods, precisions and batches; this can take a minute…', '正在比较方法、精度与批大小，可能需要一分钟…'],
  method: ['method', '方法'], epoch_takes: ['an epoch takes', '每轮用时'], use: ['Use', '采用'],
  further: ['Further settings', '更多设置'], held_out_data: ['(held out)', '（验证）'], hold_out: ['Hold out', '改作验证数据'], train_on: ['Train on', '改作训练数据'],
  name: ['Name', '名称'], name_hint: ['by model and method', '按模型和方法'], set_epochs: ['Epochs', '轮数'], set_max_steps: ['Most steps', '最多步数'],
  set_lr: ['Learning rate', '学习率'], set_eval_every: ['Steps between evaluations', '评估间隔步数'], set_seed: ['Seed', '随机种子'],
  start_run: ['Start', '开始训练'], starting: ['Checking, and starting a process…', '正在检查并启动进程…'],
  pause: ['Pause', '暂停'], stop: ['Stop at once', '立即停止'], resume: ['Resume', '继续'], report: ['Report', '报告'], progress: ['progress', '进度'], log: ['What it printed', '输出日志'],
  doing_pause: ['The step in progress is finished and saved…', '正在完成并保存当前步…'], doing_stop: ['Ending…', '正在结束…'], doing_resume: ['Going on from the last checkpoint…', '正在从上一个检查点继续…'],
  state_running: ['running', '训练中'], state_starting: ['starting', '正在启动'], state_finished: ['finished', '已完成'], state_stopped: ['stopped, can go on', '已停止，可继续'],
  state_failed: ['failed', '失败'], state_broken: ['broken', '已损坏'],
  live_step: ['step', '步'], live_epoch: ['epoch', '轮'], live_loss: ['loss', '损失'], live_held_out: ['held-out loss', '验证损失'], live_lr: ['learning rate', '学习率'],
  live_speed: ['tokens/s', '词元/秒'], live_memory_now: ['memory', '内存'], live_memory_planned: ['memory, planned', '规划内存'],
  curve: ['Curve', '曲线'], curve_loss: ['Loss', '损失'], curve_held_out: ['Held-out loss', '验证损失'], curve_lr: ['Learning rate', '学习率'], curve_speed: ['Tokens per second', '每秒词元数'], curve_train: ['training', '训练'],
  zoom_out: ['Whole', '全部'], logarithmic: ['Logarithmic', '对数'], chart_help: ['Draw across to zoom; arrows, + and - by keyboard', '拖动可放大；键盘用方向键、+ 和 -'],
  refresh: ['Refresh', '刷新'], no_runs: ['No runs yet.', '还没有训练结果。'], run: ['run', '名称'], state: ['state', '状态'], model_short: ['model', '模型'], steps: ['steps', '步数'], step: ['step', '步'],
  before: ['held-out before', '训练前验证损失'], after: ['after', '训练后'], peak: ['peak memory', '内存峰值'], seconds: ['seconds', '秒'], compare: ['compare', '比较'],
  together: ['Curves together', '曲线对比'], differences: ['Settings that differ', '不同的设置'], no_differences: ['All settings are the same.', '设置完全相同。'], setting: ['setting', '设置'],
  temperature: ['Temperature', '温度'], longest: ['Longest answer', '最长回答'], forget: ['New conversation', '新对话'], unload: ['Free the memory', '释放内存'],
  question: ['Question', '问题'], question_hint: ['Ask both; Enter sends', '同时问两个模型；回车发送'], ask: ['Ask', '发送'], answering: ['Answering; the model is loaded first…', '正在回答；会先加载模型…'],
  side_base: ['Base model', '基座模型'], side_tuned: ['Tuned', '微调后'], no_finished: ['No finished run yet.', '还没有完成的训练。'],
  to: ['Make', '生成'], to_merge: ['merged model (transformers)', '合并后的模型（transformers）'], to_gguf: ['GGUF for llama.cpp', '给 llama.cpp 的 GGUF'],
  'to_gguf-lora': ['adapter as GGUF', 'GGUF 格式的适配器'], to_ollama: ['folder for Ollama', '给 Ollama 的目录'], to_vllm: ['for vLLM', '给 vLLM'],
  numbers: ['Numbers', '数值类型'], make: ['Make it', '开始生成'], download_adapter: ['Download the adapter', '下载适配器'], download: ['Download', '下载'], size: ['size', '大小'],
};

// Parts of memory, by the names that plans give them.
const PARTS = {
  'frozen weights': '冻结的权重', 'quantization constants': '量化常数', 'trainable weights': '可训练的权重', gradients: '梯度', 'optimizer states': '优化器状态',
  activations: '激活值', 'logits and loss': 'logits 与损失', 'dequantized and cast weights': '反量化与转换的权重', temporaries: '临时张量', 'CUDA context': 'CUDA 上下文',
  'workspaces and rounding': '工作区与取整', outside: '张量之外', fragmentation: '碎片', 'Python, torch and data': 'Python、torch 与数据', 'kernels, threads and buffers': '内核、线程与缓冲区', 'holes in the heap': '堆中的空洞',
};

let at = 0;
export const language = () => at ? 'zh' : 'en';
export function setLanguage(name) {
  at = name === 'zh' ? 1 : 0;
  document.documentElement.lang = at ? 'zh-CN' : 'en';
}
export const partName = name => at && PARTS[name] || name;
export const t = name => TEXTS[name]?.[at] ?? name;

// Texts, names for screen readers and hints of what stands in index.html.
export function fill(root) {
  for (const one of root.querySelectorAll('[data-t]')) one.textContent = t(one.dataset.t);
  for (const one of root.querySelectorAll('[data-label]')) one.setAttribute('aria-label', t(one.dataset.label));
  for (const one of root.querySelectorAll('[data-hint]')) one.placeholder = t(one.dataset.hint);
}
