"""Models: their location, the architecture of their family, loading them, and their layers one at a time."""

from adapruner.models._architecture import (
    ATTENTION as ATTENTION,
    Architecture as Architecture,
    ProjectionNames as ProjectionNames,
    RowKind as RowKind,
    architecture_of as architecture_of,
    check_length as check_length,
    check_tokens as check_tokens,
    family_named as family_named,
    fields_by_layer as fields_by_layer,
    has_causal_model as has_causal_model,
    is_pruned as is_pruned,
    known_architectures as known_architectures,
    lacks_attention as lacks_attention,
    new_model as new_model,
    register_architectures as register_architectures,
    remember_family as remember_family,
    stock_config as stock_config,
    stock_fields as stock_fields,
    using_architecture as using_architecture,
)
from adapruner.models._config import (
    FILE_FIELDS as FILE_FIELDS,
    check_config as check_config,
    find_wrapper as find_wrapper,
    load_config as load_config,
)
from adapruner.models._deferred import (
    StoredWeight as StoredWeight,
    deferred_by_module as deferred_by_module,
    read_all as read_all,
    read_parts as read_parts,
)
from adapruner.models._device import (
    computes_bfloat16_natively as computes_bfloat16_natively,
    computing_repeatably as computing_repeatably,
    copy_in_dtype as copy_in_dtype,
    describe_device as describe_device,
    in_fastest_dtype as in_fastest_dtype,
    resolve_device as resolve_device,
    resolve_devices as resolve_devices,
    trial_dtype as trial_dtype,
    usable_devices as usable_devices,
)
from adapruner.models._fingerprint import fingerprint as fingerprint
from adapruner.models._generation import (
    NO_TOKEN as NO_TOKEN,
    batches_together as batches_together,
    continue_texts as continue_texts,
    texts_at_once as texts_at_once,
)
from adapruner.models._layers import (
    LayerCall as LayerCall,
    change_weight as change_weight,
    decoder_layers as decoder_layers,
    enter_layers as enter_layers,
    hold_places as hold_places,
    is_streamed as is_streamed,
    layer_devices as layer_devices,
    loaded_layer as loaded_layer,
    move_resident as move_resident,
    other_forwards as other_forwards,
    overwrite_weight as overwrite_weight,
    place_layers as place_layers,
    skipping_layers as skipping_layers,
    stream_from_memory as stream_from_memory,
    stream_layers as stream_layers,
    whole_state as whole_state,
    without_attention as without_attention,
)
from adapruner.models._loading import (
    check_streamable as check_streamable,
    empty_model as empty_model,
    is_streamable as is_streamable,
    load_model as load_model,
    load_tokenizer as load_tokenizer,
)
from adapruner.models._places import (
    ModelLocation as ModelLocation,
    find_model as find_model,
    quiet_transformers as quiet_transformers,
    reported as reported,
    reported_as_unloadable as reported_as_unloadable,
)
from adapruner.models._stored import has_multi_token_head as has_multi_token_head
from adapruner.models._wrapper import (
    Wrapper as Wrapper,
    give_wrapper as give_wrapper,
    wrapper_of as wrapper_of,
)
