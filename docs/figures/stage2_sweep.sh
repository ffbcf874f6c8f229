#!/usr/bin/env bash
# The sweeps of docs/unitoken.md, on what the quickstart left; their sweep.png are tower_rate.png and generation_ratio.png:
# bash docs/figures/stage2_sweep.sh runs/quickstart runs/tower_rate "optimizer.lr_scales[vision_tower.*]=0.01,0.1,1,10"
# bash docs/figures/stage2_sweep.sh runs/quickstart runs/ratio data.blend.1.weight=0.25,0.5,1,2
set -euo pipefail
quickstart=$1 output=$2 swept=$3
export DS_ACCELERATOR=cpu OMP_NUM_THREADS=1

for split in train val; do
  python -m data_pipeline.pretokenize --inputs "$quickstart/sample_data/images/$split/scenes" --features pixels \
    --visual-tokenizer "$quickstart/tokenizer/export" --output "$output/codes/$split"
done

# The quickstart's decoder and heads, as it draws them, in place of those of a stage I, at rates for their size.
decoder="{model_type: qwen2, vocab_size: 4096, hidden_size: 192, intermediate_size: 576, num_hidden_layers: 4, \
num_attention_heads: 8, num_key_value_heads: 8, initializer_range: 0.07, max_position_embeddings: 1320, \
tie_word_embeddings: true}"
heads="{visual_input: codes_and_features, head_hidden_size: 128, head_num_layers: 1, head_num_attention_heads: 4, \
head_intermediate_size: 384, place_embedding: true}"
held_out="[{path: $output/codes/val, view: document}, {path: $output/codes/val, view: generate}]"

dualtoken sweep unitoken_stage2 "$swept" steps=160 \
  model.init_from=null "model.llm_config=$decoder" "model.heads=$heads" model.vision_tower="$quickstart/siglip/export" \
  model.visual_tokenizer="$quickstart/tokenizer/export" \
  model.text_tokenizer="$quickstart/sample_data/text_tokenizer" \
  optimizer.lr=1e-3 "optimizer.lr_scales[pixel_*]=1" "optimizer.lr_scales[semantic_*]=1" \
  optimizer.warmup_ratio=0.03 losses.semantic=0.03 global_batch_size=2 gradient_checkpointing=false \
  data.blend.0.path="$output/codes/train" data.blend.1.path="$output/codes/train" data.num_workers=0 \
  data.context_length=1320 validation_data.context_length=1320 "validation_data.blend=$held_out" \
  validate_every=40 checkpoint_every=0 log_every=5 wandb.mode=disabled --ranks 1 --output "$output/sweep"
