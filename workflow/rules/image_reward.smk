IMAGE_REWARD = "results/image_reward/{scenario}.json"


# Human preference, as a model of it has it: asked for by name alone, in an environment that the settings name.
rule image_reward:
    input:
        expand(IMAGE_REWARD, scenario=QUANTIZED),


rule image_reward_row:
    input:
        images=images_of,
        reference=reference_of,
        prompts=lambda wildcards: prompts_of(wildcards.scenario),
    output:
        IMAGE_REWARD,
    log:
        "logs/image_reward/{scenario}.log",
    threads: THREADS
    resources:
        gpu=GPU,
    params:
        python=lambda wildcards: (
            ["--python", shlex.quote(SETTINGS.metrics.image_reward_python)]
            if SETTINGS.metrics.image_reward_python
            else []
        ),
        images=lambda wildcards, input: each("--images", input.images),
        reference=lambda wildcards, input: each("--reference", input.reference),
        prompts=lambda wildcards, input: each("--prompts", input.prompts),
        code=sources.verb_hash(ROOT, "image_reward"),
        how=f"--bootstrap {SETTINGS.metrics.bootstrap} --seed {SETTINGS.seed}",
    shell:
        "{HALFTONE} image-reward {params.images} {params.reference} {params.prompts} {params.python} {params.how}"
        " -o {output} &> {log}"
